"""Graph passes, from opset 23 on. `compute_equal_rows_once` is for every compiler that reads ONNX.

`fit_cuda` is for ONNX Runtime's CUDA provider, `fit_cpu` for its CPU kernels; `bench/unet_cpu.py` measures each pass
of the latter. ONNX Runtime's own optimiser already fuses SiLU and GELU and lays out convolutions; what it leaves undone
in a Stable Diffusion UNet is done there. Its kernels already run at the speed of the processor's multipliers, so that
only less arithmetic is faster. Both results hold operators of ONNX Runtime's own domain, com.microsoft.
"""

import math
from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.rewriter import pattern, rewrite

# values of a result for one image; for what no cache holds, Gemm's bias costs more than an Add
GEMM_LIMIT = 2**18

# what the kernels of MultiHeadAttention and InstanceNormalization take
_CPU_TYPES = frozenset({ir.DataType.FLOAT})
_CUDA_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})

# which of three taps on an image doubled in size fall on the same pixel of the small one: (phase, small tap, tap)
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], float)


def fit_cpu(model: ir.Model) -> None:
    """Rewrite `model` in place: same inputs and outputs, same values up to rounding.

    The weights stay as they are; only those of a linear layer whose result is split are cut in two.
    """
    rewrite(model, pattern_rewrite_rules=[FuseAttention.rule(_CPU_TYPES)])
    compute_equal_rows_once(model.graph)
    rewrite(model, pattern_rewrite_rules=[LowerGroupNorm.rule(_CPU_TYPES), CutLinear.rule()])
    # after the cut: of both parts of a linear layer, too
    rewrite(model, pattern_rewrite_rules=[FuseBias.rule()])
    rewrite(model, pattern_rewrite_rules=[ConvolveBeforeUpsampling.rule()])
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # traces of this machine's source files, most of the graph's bytes


def fit_cuda(model: ir.Model) -> None:
    """Rewrite `model` in place for ONNX Runtime's CUDA provider: same inputs, outputs and values up to rounding.

    It has no kernel of GroupNormalization, and one of its own for channels-last images alone.
    """
    rewrite(model, pattern_rewrite_rules=[FuseAttention.rule(_CUDA_TYPES)])
    compute_equal_rows_once(model.graph)
    rewrite(model, pattern_rewrite_rules=[LowerGroupNorm.rule(_CUDA_TYPES)])
    RemoveUnusedNodesPass()(model)


class FuseAttention(pattern.RewriteRuleClassBase):
    """Heads split, attention, heads merged -> MultiHeadAttention on (B,S,D), a flash attention on CPU and GPU.

    The CPU kernel of the standard operator is slower and holds all scores at once, (B,heads,S,S). On a GPU older
    releases have none, and give the node to the CPU.
    """

    def __init__(self, types: Container[Any]) -> None:
        super().__init__()
        self._types = types

    def pattern(self, op: Any, q: Any, k: Any, v: Any, q_to: Any, k_to: Any, v_to: Any, to: Any) -> Any:
        heads = [
            op.Transpose(op.Reshape(x, shape, _allow_other_attributes=True), perm=[0, 2, 1, 3])
            for x, shape in ((q, q_to), (k, k_to), (v, v_to))
        ]
        merged = op.Transpose(op.Attention(*heads, _outputs=["attention"]), perm=[0, 2, 1, 3])
        return op.Reshape(merged, to, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context: Any, q: Any, k: Any, v: Any, attention: Any, out: Any, **_: Any) -> bool:
        node = attention.producer()
        plain = q.dtype in self._types
        plain = (
            plain
            and not node.attributes.get_int("is_causal", 0)
            and not node.attributes.get_float("softcap", 0.0)
        )
        split = [heads.producer().inputs[0] for heads in node.inputs]
        merged = out.producer().inputs[0]
        return plain and all(
            _splits_last_axis(x, y) for x, y in zip((q, k, v, out), (*split, merged), strict=True)
        )

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, attention: Any, **_: Any) -> Any:
        scale = attention.producer().attributes.get_float("scale", 0.0)  # 0: one over the root of the width
        return op.MultiHeadAttention(
            q, k, v, num_heads=attention.shape[1], scale=scale, _domain="com.microsoft", _version=1
        )


class LowerGroupNorm(pattern.RewriteRuleClassBase):
    """GroupNormalization -> InstanceNormalization of the groups, then each channel's scale and bias.

    ONNX Runtime has no kernel for it and expands it to a dozen operators, most over the whole tensor. On the CPU
    BatchNormalization of mean 0 and variance 1 is scale and bias in one pass, with the bits of Mul and Add; in half
    precision it has no kernel.
    """

    def __init__(self, types: Container[Any]) -> None:
        super().__init__()
        self._types = types

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.GroupNormalization(x, weight, bias, _outputs=["out"])

    def check(self, context: Any, x: Any, weight: Any, bias: Any, **_: Any) -> bool:
        known = x.shape is not None and all(isinstance(size, int) for size in x.shape[1:])
        return known and x.dtype in self._types and _is_constant(weight) and _is_constant(bias)

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, out: Any) -> Any:
        node, sizes = out.producer(), x.shape[1:]

        def constant(name: str, values: Any) -> Any:
            return op.initializer(ir.tensor(np.asarray(values)), f"{out.name}_{name}")

        groups, dtype = node.attributes["num_groups"].as_int(), x.dtype.numpy()
        normal = op.InstanceNormalization(
            op.Reshape(x, constant("groups", [0, groups, -1])),
            constant("one", np.ones(groups, dtype)),
            constant("zero", np.zeros(groups, dtype)),
            epsilon=node.attributes["epsilon"].as_float(),
        )
        normal = op.Reshape(normal, constant("shape", [0, *sizes]))
        if self._types is _CUDA_TYPES:
            by_channel = [-1, *(1 for _ in sizes[1:])]
            scale, shift = (v.const_value.numpy().astype(dtype).reshape(by_channel) for v in (weight, bias))
            return op.Add(op.Mul(normal, constant("scale", scale)), constant("bias", shift))
        mean, variance = np.zeros(sizes[0], dtype), np.ones(sizes[0], dtype)
        return op.BatchNormalization(
            normal, weight, bias, constant("mean", mean), constant("variance", variance), epsilon=0.0
        )


class CutLinear(pattern.RewriteRuleClassBase):
    """Linear layer, its result split in two -> two linear layers; in GEGLU, that spares a copy of the result."""

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        linear = op.Add(op.MatMul(x, weight), bias, _outputs=["linear"])
        return op.Split(linear, num_outputs=2, _allow_other_attributes=True, _outputs=["first", "second"])

    def check(self, context: Any, weight: Any, bias: Any, linear: Any, first: Any, **_: Any) -> bool:
        if linear.shape is None or _axis(first.producer(), linear) != linear.shape.rank() - 1:
            return False
        return _is_linear(weight, bias) and weight.shape[1] % 2 == 0

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, first: Any, second: Any, **_: Any) -> Any:
        halves = zip(*(np.split(v.const_value.numpy(), 2, axis=-1) for v in (weight, bias)), strict=True)

        def constant(name: str, values: Any) -> Any:
            return op.initializer(ir.tensor(np.ascontiguousarray(values)), name)

        return tuple(
            op.Add(op.MatMul(x, constant(f"{out.name}_weight", w)), constant(f"{out.name}_bias", b))
            for out, (w, b) in zip((first, second), halves, strict=True)
        )


class FuseBias(pattern.RewriteRuleClassBase):
    """Linear layer of (B,S,K) -> Gemm of (B * S,K), which adds the bias itself; S is a known, small number.

    ONNX Runtime does this by itself only where B is a number too.
    """

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias, _outputs=["out"])

    def check(self, context: Any, x: Any, weight: Any, bias: Any, **_: Any) -> bool:
        known = x.shape is not None and x.shape.rank() == 3 and isinstance(x.shape[1], int)
        known = known and x.dtype == ir.DataType.FLOAT and _is_linear(weight, bias)
        return known and x.shape[1] * weight.shape[1] <= GEMM_LIMIT

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, out: Any) -> Any:
        def shape(name: str, *sizes: int) -> Any:
            return op.initializer(ir.tensor(np.array([-1, *sizes])), f"{out.name}_{name}")

        width, wide = weight.shape
        rows = op.Reshape(x, shape("rows", width))
        return op.Reshape(op.Gemm(rows, weight, bias), shape("shape", x.shape[1], wide))


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


def compute_equal_rows_once(graph: ir.Graph) -> None:
    """Where a tensor is another one stacked twice, compute on that one and double the result.

    Guidance doubles the latents, and the two halves differ only from the first cross-attention on. What comes
    before it is then half the work; in SD1.x that holds one of the five largest self-attentions. With latents of 64x64
    it spares 2.6 % of the UNet's multiplications. An opset below 23 has no operators for norm and attention, and what
    stands for them there ends the search early.
    """
    half: dict[Any, Any] = {}  # of each doubled tensor
    for node in list(graph):
        first, output = (node.inputs or [None])[0], node.outputs[0]
        if first is not None and _doubles_rows(node):
            half[output] = first
        elif node.op_type == "Expand" and _same_shape(first, output):
            assert first is not None
            ir.convenience.replace_all_uses_with(output, first)
        elif any(value in half for value in node.inputs) and _keeps_rows_apart(node, half):
            _compute_half(graph, node, half)
    # the concatenations that nothing reads any more go with the unused nodes


def _doubles_rows(node: ir.Node) -> bool:
    first, output = node.inputs[0], node.outputs[0]
    return node.op_type == "Concat" and list(node.inputs) == [first, first] and _axis(node, output) == 0


def _compute_half(graph: ir.Graph, node: ir.Node, half: dict[Any, Any]) -> None:
    rows = next(half[value].shape[0] for value in node.inputs if value in half)
    for index, value in enumerate(node.inputs):
        node.replace_input_with(index, half.get(value, value))
    for once in node.outputs:
        assert once.shape is not None
        twice = ir.Value(name=f"{once.name}_twice", type=once.type, shape=once.shape)
        once.shape = ir.Shape([rows, *once.shape[1:]])
        ir.convenience.replace_all_uses_with(once, twice)
        graph.insert_after(node, ir.node("Concat", [once, once], {"axis": 0}, outputs=[twice]))
        half[twice] = once


def _keeps_rows_apart(node: Any, half: dict[Any, Any]) -> bool:
    """Whether row i of the result comes from row i of the doubled inputs and, beside them, from constants alone."""
    first, *others = node.inputs
    output = node.outputs[0]
    if output.is_graph_output() or any(
        value is None or value.shape is None for value in (*node.inputs, output)
    ):
        return False
    if node.op_type in ("Add", "Div", "Mul", "Sub"):
        rank = output.shape.rank()
        return all(v.shape.rank() == rank if v in half else _without_rows(v, rank) for v in node.inputs)
    if node.op_type in ("Attention", "MultiHeadAttention", "Concat"):
        apart = node.op_type != "Concat" or _axis(node, output) != 0
        return apart and all(value in half for value in node.inputs)
    if first not in half or not all(_is_constant(value) for value in others):
        return False
    match node.op_type:
        case "Cast" | "Conv" | "Cos" | "Gelu" | "GroupNormalization" | "Sigmoid" | "Sin":
            return True
        case "Gemm":
            return not node.attributes.get_int("transA", 0)
        case "LayerNormalization":
            return _axis(node, first, default=-1) > 0
        case "MatMul":
            return first.shape.rank() > 1 and others[0].shape.rank() == 2
        case "Reshape":
            rows, *sizes = others[0].const_value.numpy().tolist()
            return rows == -1 and math.prod(sizes) == _row_size(first)
        case "Slice":
            return len(others) > 2 and _spares_rows(others[2], first)
        case "Split":
            return _axis(node, first) != 0
        case "Transpose":
            return node.attributes["perm"].as_ints()[0] == 0
        case "Unsqueeze":
            return _spares_rows(others[0], output)
    return False


def _is_constant(value: Any) -> bool:
    return value.const_value is not None


def _is_linear(weight: Any, bias: Any) -> bool:
    """Whether they are the matrix (in,out) and the bias (out,) of a linear layer."""
    known = _is_constant(weight) and _is_constant(bias) and weight.shape.rank() == 2
    return known and list(bias.shape) == [weight.shape[1]]


def _without_rows(value: Any, rank: int) -> bool:
    """Whether broadcasting gives every row of a tensor of that rank the same part of the constant."""
    return _is_constant(value) and (value.shape.rank() < rank or value.shape[0] == 1)


def _axis(node: Any, of: Any, default: int = 0) -> int:
    """The attribute "axis", counted from the front of the tensor `of`."""
    return node.attributes.get_int("axis", default) % of.shape.rank()


def _spares_rows(axes: Any, of: Any) -> bool:
    return all(axis % of.shape.rank() for axis in axes.const_value.numpy().tolist())


def _row_size(value: Any) -> int | None:
    sizes = value.shape[1:]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _splits_last_axis(x: Any, y: Any) -> bool:
    """Whether `y` (B,S,heads,width) is `x` (B,S,heads * width)."""
    if x.shape is None or y.shape is None or (x.shape.rank(), y.shape.rank()) != (3, 4):
        return False
    heads, width = y.shape[2:]
    return isinstance(width, int) and _same_size(x.shape[1], y.shape[1]) and x.shape[2] == heads * width


def _same_shape(x: Any, y: Any) -> bool:
    if x is None or x.shape is None or y.shape is None or x.shape.rank() != y.shape.rank():
        return False
    return all(_same_size(a, b) for a, b in zip(x.shape, y.shape, strict=True))


def _same_size(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return a == b and (isinstance(a, int) or a.value is not None)  # two unknown sizes are not the same


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


def _floats(op: Any, name: str, values: NDArray[Any]) -> Any:
    return op.initializer(ir.tensor(np.ascontiguousarray(values, np.float32)), name)


def _integers(op: Any, name: str, *values: int) -> Any:
    return op.initializer(ir.tensor(np.array(values, np.int64)), name)
