"""The weights of an antialiased bicubic resize along one axis."""

from functools import lru_cache

import numpy as np


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
def resize_bands(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The same without the zeros: `first` (target,) int32 and `weights` (target, taps) float32.

    Output i is the sum over k of weights[i, k] * input[first[i] + k]; first[i] + taps never passes the end.
    """
    dense = resize_weights(source, target)
    start = (dense != 0).argmax(axis=1)
    stop = source - (dense[:, ::-1] != 0).argmax(axis=1)
    taps = int((stop - start).max())
    first = np.minimum(start, source - taps)
    weights = np.take_along_axis(dense, first[:, None] + np.arange(taps), axis=1)
    return first.astype(np.int32), weights.astype(np.float32)
