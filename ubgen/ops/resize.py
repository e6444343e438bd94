"""From bytes to the pixels that a vision tower sees: antialiased bicubic resize and normalisation, fused."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ubgen.ops import _native, reference
from ubgen.ops._direct import direct
from ubgen.ops.bicubic import resize_bands


def resize_normalise(
    pixels_BHW3: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    border: Sequence[int] | None = None,
) -> Tensor:
    """uint8 images (B, H, W, 3) of any size to float32 (B, 3, size, size): (resized / 255 - mean) / std.

    The resize is antialiased bicubic (a = -0.5), straight to size x size. With a `border` colour (three values of 0 to
    255) the image is first centred on a square of that colour, and clamped after each pass: along the width, then along
    the height. So CLIP's preprocessing and the default of Q-Align are the plain form, and Q-Align's `fit="pad"` is the
    one with a border; see `ubgen.rewards.clip_preprocess` and `qalign_preprocess`.

    Equal to `ubgen.ops.reference` within 1e-5. Runs in the native library where that was built, else there. No
    gradient. ValueError for another shape or dtype, an image without pixels, or a size below 1.
    """
    if pixels_BHW3.ndim != 4 or pixels_BHW3.shape[3] != 3 or pixels_BHW3.dtype != torch.uint8:
        raise ValueError(
            f"resize_normalise: pixels must be uint8 (B, H, W, 3), not {pixels_BHW3.dtype} {tuple(pixels_BHW3.shape)}"
        )
    if size < 1 or 0 in pixels_BHW3.shape[1:3]:
        raise ValueError(f"resize_normalise: cannot make {size}x{size} out of {tuple(pixels_BHW3.shape)}")
    call = _run if direct(pixels_BHW3) else _resize_normalise
    return call(pixels_BHW3, size, list(mean), list(std), None if border is None else list(border))


class _Axis(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_int64),
        ("target", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )


class _Framing(ctypes.Structure):
    _fields_ = (
        ("top", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("border", ctypes.c_uint8 * 3),
        ("bounded", ctypes.c_int32),
        ("scale", ctypes.c_float * 3),
        ("shift", ctypes.c_float * 3),
    )


@lru_cache(maxsize=64)
def _axis(source: int, target: int, device: torch.device) -> tuple[_Axis, Tensor, Tensor]:
    """The tensors are there to be kept alive with the pointers to them."""
    first, weights = (torch.from_numpy(array).to(device) for array in resize_bands(source, target))
    return _Axis(source, target, weights.shape[1], first.data_ptr(), weights.data_ptr()), first, weights


def _framing(
    height: int, width: int, mean: list[float], std: list[float], border: list[int] | None
) -> _Framing:
    side = max(height, width) if border is not None else 0
    framing = _Framing(max(side - height, 0) // 2, max(side - width, 0) // 2)
    framing.border[:] = border or (0, 0, 0)
    framing.bounded = border is not None
    framing.scale[:] = [1 / (255 * s) for s in std]
    framing.shift[:] = [-m / s for m, s in zip(mean, std, strict=True)]
    return framing


def _run(pixels: Tensor, size: int, mean: list[float], std: list[float], border: list[int] | None) -> Tensor:
    native = _native.function("resize_normalise", pixels.device.type)
    if native is None:
        return reference.resize_normalise(pixels, size, mean, std, border=border)
    pixels = pixels.contiguous()
    batch, height, width, _ = pixels.shape
    out = _output(pixels, size)
    side = max(height, width)
    with _native.device_of(pixels):
        across, *_ = _axis(side if border is not None else width, size, pixels.device)
        down, *_ = _axis(side if border is not None else height, size, pixels.device)
        framing = _framing(height, width, mean, std, border)
        native(
            *(pixels.data_ptr(), batch, height, width),
            *(ctypes.addressof(across), ctypes.addressof(down), ctypes.addressof(framing), out.data_ptr()),
        )
    return out


def _output(pixels: Tensor, size: int) -> Tensor:
    return pixels.new_empty((pixels.shape[0], 3, size, size), dtype=torch.float32)


_resize_normalise = torch.library.custom_op("ubgen::resize_normalise", _run, mutates_args=())


@_resize_normalise.register_fake
def _(pixels, size, mean, std, border):  # type: ignore[no-untyped-def]
    return _output(pixels, size)
