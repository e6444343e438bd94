"""From images to what CLIP and Q-Align see: bicubic resizing as two matrix products, CLIP mean and std.

Written as matrix products because they are differentiable, exact (the weights are computed in float64) and
become plain MatMul nodes in an exported graph, where back ends disagree about Resize.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122 / 255, 116 / 255, 104 / 255)  # CLIP_MEAN * 255 with the fraction dropped, as Q-Align pads


def _cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5, the one of PIL and of antialiased torch resizing."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


@lru_cache(maxsize=64)
def resize_weights(source: int, target: int) -> np.ndarray:
    """(target, source) float64 weights; each row sums to 1. The identity when nothing is resized.

    When shrinking, the kernel is widened by source / target; at the borders the weights inside the image are
    renormalised.
    """
    scale = source / target
    width = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum(np.floor(centre - 2 * width + 0.5), 0)[:, None]
    last = np.minimum(np.floor(centre + 2 * width + 0.5), source)[:, None]
    pixel = np.arange(source)[None, :]
    weights = _cubic((pixel + 0.5 - centre[:, None]) / width)
    weights = np.where((pixel >= first) & (pixel < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=64)
def _device_matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(resize_weights(source, target), dtype=dtype, device=device)


def _matrix(source: int, target: int, like: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a tensor made while tracing must not outlive the trace in the cache
        return torch.tensor(resize_weights(source, target), dtype=like.dtype, device=like.device)
    with torch.inference_mode(False):  # a cached inference tensor could not serve a later backward pass
        return _device_matrix(source, target, like.dtype, like.device)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would round the pixels to half precision. Entered only where it is on, to keep traces plain."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _settle(images_B3HW: Tensor, bounded: bool, quantise: bool) -> Tensor:
    if bounded or quantise:
        images_B3HW = images_B3HW.clamp(0, 1)
    if quantise:  # straight-through: rounded value, gradient of the unrounded one
        images_B3HW = images_B3HW + ((images_B3HW * 255).round() / 255 - images_B3HW).detach()
    return images_B3HW


def resize(images_B3HW: Tensor, size: int, *, bounded: bool = False, quantise: bool = False) -> Tensor:
    """Antialiased bicubic resize (a = -0.5) of (B, 3, H, W) to (B, 3, size, size), whatever the aspect ratio.

    First along the width, then along the height; a pass that changes nothing is skipped. `bounded` clamps to
    [0, 1] after each pass, `quantise` also rounds to 1/255 there (gradient straight through), as PIL does on
    uint8. float16 and bfloat16 are computed and returned in float32, under autocast too. Differentiable.
    """
    images = images_B3HW if images_B3HW.dtype == torch.float64 else images_B3HW.float()
    height, width = images.shape[-2:]
    with _without_autocast(images.device.type):
        if width != size:
            images = _settle(images @ _matrix(width, size, images).T, bounded, quantise)
        if height != size:
            images = _settle(_matrix(height, size, images) @ images, bounded, quantise)
    return images


def normalise(images_B3HW: Tensor) -> Tensor:
    """[0, 1] RGB (B, 3, H, W) -> zero-centred pixels with CLIP's mean and std."""
    mean = torch.tensor(CLIP_MEAN, dtype=images_B3HW.dtype, device=images_B3HW.device)[:, None, None]
    std = torch.tensor(CLIP_STD, dtype=images_B3HW.dtype, device=images_B3HW.device)[:, None, None]
    return (images_B3HW - mean) / std


def pad_to_square(images_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, L, L), L the longer side, centred on Q-Align's mean colour.

    An odd remainder pixel goes to the bottom or to the right.
    """
    height, width = images_B3HW.shape[-2:]
    side = max(height, width)
    if height == width:
        return images_B3HW
    top, left = (side - height) // 2, (side - width) // 2
    borders = (left, side - width - left, top, side - height - top)
    channels = [F.pad(images_B3HW[:, c], borders, value=colour) for c, colour in enumerate(PAD_COLOUR)]
    return torch.stack(channels, dim=1)


def clip_preprocess(images_B3HW: Tensor, size: int = 224) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of any size -> CLIP's pixels (B, 3, size, size). Differentiable.

    The rule of the authors' released code: antialiased bicubic straight to size x size (no crop, the aspect
    ratio is not kept), CLIP mean and std. Values outside [0, 1] are not clamped, so they keep their gradient.
    """
    return normalise(resize(images_B3HW, size))


def qalign_preprocess(
    images_B3HW: Tensor, size: int = 448, *, fit: Literal["squash", "pad"] = "squash", quantise: bool = False
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of any size -> Q-Align's pixels (B, 3, size, size). Differentiable.

    fit="squash" (default) is the training rule of the authors' released code: antialiased bicubic straight to
    size x size, nothing clamped. fit="pad" is the scorer's own image path: pad to a square with the mean
    colour, resize along the width and then the height, clamped to [0, 1] after each pass; with `quantise`
    also rounded to 1/255 there, which reproduces PIL to one grey level. The two agree for squares up to the
    clamp.
    """
    if fit == "squash":
        return normalise(resize(images_B3HW, size, quantise=quantise))
    return normalise(resize(pad_to_square(images_B3HW), size, bounded=True, quantise=quantise))
