"""Graph passes that spare 3x3 convolutions multiplications, for ONNX Runtime's CPU kernels; see `onnx_passes`.

Those kernels already run at the speed of the processor's multipliers, so that only less arithmetic is faster.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter import pattern

Matrix = NDArray[np.floating[Any]]

TILE = 4  # rows and columns of an image that Winograd's algorithm takes as one tile
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # beside infinity; of the usual choices, the one with the least rounding
MIN_CHANNELS = 128  # into the convolution; with fewer, carrying images to and fro costs what it saves
MAX_PAIRS = 2**16  # of channels; the transformed weights, 36 values a pair, are read in every call

# which of three taps on an image doubled in size fall on the same pixel of the small one: (phase, small tap, tap)
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], float)


class ConvolveBeforeUpsampling(pattern.RewriteRuleClassBase):
    """Nearest-neighbour times 2, then a 3x3 convolution -> four 2x2 convolutions of the small image, interleaved.

    4/9 of the multiplications: taps that meet the same small pixel are summed beforehand.
    """

    def pattern(self, op: Any, x: Any, scales: Any, weight: Any, bias: Any) -> Any:
        large = op.Resize(x, None, scales, _outputs=["large"])
        return op.Conv(large, weight, bias, _outputs=["out"])

    def check(self, context: Any, x: Any, weight: Any, bias: Any, large: Any, out: Any, **_: Any) -> bool:
        return _is_same_size_3x3(out.producer(), weight, bias) and _doubles(large.producer(), x, large)

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, out: Any, **_: Any) -> Any:
        name, channels, (height, width) = out.name, weight.shape[0], x.shape[2:]
        summed = np.einsum("pai,qbj,ocij->pqocab", _PHASES, _PHASES, weight.const_value.numpy())

        def phase(a: int, b: int) -> Any:
            kernel = _floats(op, f"{name}_phase{a}{b}", summed[a, b])
            return op.Conv(x, kernel, bias, pads=[1 - a, 1 - b, a, b])

        # two concatenations of the innermost axis are several times faster than DepthToSpace
        last, wide = _integers(op, f"{name}_last", 4), _integers(op, f"{name}_wide", 0, channels, height, -1)
        lines = [
            op.Reshape(op.Concat(*(op.Unsqueeze(phase(a, b), last) for b in (0, 1)), axis=4), wide)
            for a in (0, 1)
        ]
        shape = _integers(op, f"{name}_shape", 0, channels, 2 * height, 2 * width)
        return op.Reshape(op.Concat(*lines, axis=3), shape)


class WinogradConv(pattern.RewriteRuleClassBase):
    """3x3 convolution of 4x4 images -> matrix products, a quarter of its multiplications in the largest of them.

    Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", F(4x4,3x3): the image, with its border of
    zeros, is one tile. Each of the three steps is one product over all images of a batch. Only for rows that guidance
    doubled: ONNX Runtime multiplies a single row by another kernel, which rounds otherwise. Rounds ten times as much as
    the convolution.
    """

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Conv(x, weight, bias, _outputs=["out"])

    def check(self, context: Any, x: Any, weight: Any, bias: Any, out: Any, **_: Any) -> bool:
        if not _is_same_size_3x3(out.producer(), weight, bias) or x.shape is None:
            return False
        after, before = weight.shape[:2]
        fits = before >= MIN_CHANNELS and before * after <= MAX_PAIRS
        fits = fits and str(x.shape[0]).startswith("2*")
        return fits and x.dtype == ir.DataType.FLOAT and list(x.shape[2:]) == [TILE, TILE]

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, out: Any) -> Any:
        name, (after, before) = out.name, weight.shape[:2]
        at, g, bt = winograd(POINTS)
        inner = bt[:, 1:-1]  # the columns that meet the border meet zeros
        enter, leave = np.kron(inner, inner), np.kron(at, at).T
        frequencies = len(enter)
        kernels = np.einsum("fi,gj,ocij->fgoc", g, g, weight.const_value.numpy())

        def reshape(value: Any, suffix: str, *sizes: int) -> Any:
            return op.Reshape(value, _integers(op, f"{name}_{suffix}", *sizes))

        images = reshape(x, "images", -1, TILE * TILE)
        tiles = op.Gemm(_floats(op, f"{name}_enter", enter), images, transB=1)
        mixed = op.FusedMatMul(
            reshape(tiles, "tiles", frequencies, -1, before),
            _floats(op, f"{name}_kernels", kernels.reshape(frequencies, after, before)),
            transB=1,  # the kernels are then read in the order in which they lie
            _domain="com.microsoft",
            _version=1,
        )
        flat = reshape(mixed, "flat", frequencies, -1)
        images = op.Gemm(flat, _floats(op, f"{name}_leave", leave), transA=1)
        images = reshape(images, "shape", -1, after, TILE, TILE)
        return op.Add(images, _floats(op, f"{name}_bias", bias.const_value.numpy().reshape(-1, 1, 1)))


def winograd(points: Sequence[float]) -> tuple[Matrix, Matrix, Matrix]:
    """A^T (m,n), G (n,3) and B^T (n,n) of F(m,3), by Cook and Toom: n - 1 points and infinity, n = m + 2.

    A^T ((G g) * (B^T d)) is the correlation of d (n,) with g (3,): both are polynomials, multiplied by their values.
    """
    p, n = np.array(points), len(points) + 1
    m = n - 2
    others = [np.delete(p, i) for i in range(n - 1)]
    scales = [np.prod(point - rest) for point, rest in zip(p, others, strict=True)]
    at, g, bt = np.zeros((m, n)), np.zeros((n, 3)), np.zeros((n, n))
    at[:, :-1] = np.vander(p, m, increasing=True).T
    g[:-1] = np.vander(p, 3, increasing=True) / np.array(scales)[:, None]
    bt[:-1, :-1] = [np.poly(rest)[::-1] for rest in others]
    bt[-1] = np.poly(p)[::-1]
    at[-1, -1] = g[-1, -1] = 1  # infinity: the highest coefficients
    return at, g, bt


def _is_same_size_3x3(node: ir.Node, weight: Any, bias: Any) -> bool:
    """Whether the convolution has constant 3x3 weights, stride 1, a border of one pixel, and all channels mixed."""
    if weight.const_value is None or bias.const_value is None or list(weight.shape[2:]) != [3, 3]:
        return False
    given = node.attributes
    plain = all(set(given.get_ints(name, (1,))) == {1} for name in ("strides", "dilations"))
    return plain and set(given.get_ints("pads", (0,))) == {1} and given.get_int("group", 1) == 1


def _doubles(node: ir.Node, x: Any, large: Any) -> bool:
    """Whether the Resize repeats every pixel twice in both directions, at a known size."""
    how = ("mode", "nearest"), ("nearest_mode", "floor"), ("coordinate_transformation_mode", "asymmetric")
    if any(node.attributes.get_string(name, "") != value for name, value in how):
        return False
    if x.shape is None or large.shape is None or x.dtype != ir.DataType.FLOAT:
        return False
    small = x.shape[2:]
    known = all(isinstance(size, int) for size in small)
    return known and list(large.shape[2:]) == [2 * size for size in small]


def _floats(op: Any, name: str, values: Matrix) -> Any:
    return op.initializer(ir.tensor(np.ascontiguousarray(values, np.float32)), name)


def _integers(op: Any, name: str, *values: int) -> Any:
    return op.initializer(ir.tensor(np.array(values, np.int64)), name)
