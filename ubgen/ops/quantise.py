"""The decoder's output as bytes, with what is needed to notice a broken image, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ubgen.ops import _native, reference
from ubgen.ops._direct import direct
from ubgen.ops._layout import as_layout, layout_of


class Quantised(NamedTuple):
    """`pixels_BHW3` uint8; of each image the smallest and largest finite value before the clamp, (B,) float32, and
    how many of its values are infinite or NaN, (B,) int64. Where no value is finite, minimum is inf, maximum -inf."""

    pixels_BHW3: Tensor
    minimum_B: Tensor
    maximum_B: Tensor
    nonfinite_B: Tensor


def quantise(images_B3HW: Tensor) -> Quantised:
    """Images on the [0, 1] scale, float32, float16 or bfloat16, to bytes: clamp, times 255, round half to even.

    NaN gives 0. Reads contiguous and channels-last images as they are. Runs in the native library where that was built,
    with the same bits as `ubgen.ops.reference`; float64 runs there. No gradient. ValueError for another shape.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
        raise ValueError(
            f"quantise: images must be floating point (B, 3, H, W), not {images_B3HW.dtype} {tuple(images_B3HW.shape)}"
        )
    return Quantised(*(_run if direct(images_B3HW) else _quantise)(images_B3HW))


def _run(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native = _native.function("quantise", images.device.type) if images.dtype in _native.DTYPES else None
    if native is None:
        return reference.quantise(images)
    layout = layout_of(images)
    images = as_layout(images, layout)
    outputs = _outputs(images)
    batch, _, height, width = images.shape
    with _native.device_of(images):
        native(
            *(_native.DTYPES[images.dtype], layout, images.data_ptr(), batch, height, width),
            *(output.data_ptr() for output in outputs),
        )
    return outputs


def _outputs(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = images.shape
    pixels = images.new_empty((batch, height, width, 3), dtype=torch.uint8)
    minimum, maximum = (images.new_empty(batch, dtype=torch.float32) for _ in range(2))
    return pixels, minimum, maximum, images.new_empty(batch, dtype=torch.int64)


_quantise = torch.library.custom_op("ubgen::quantise", _run, mutates_args=())
_quantise.register_fake(_outputs)
