"""What TensorRT's ONNX parser takes: checked before a build, which would find it out an hour later and less clearly.

After the table of supported operators that onnx-tensorrt publishes for TensorRT 10.15, opsets 9 to 24, as far as
exported networks and their quantised forms can need it. Newer releases take more, not less.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from ubgen.core.errors import UserError

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_ALL = _NUMBERS | {TensorProto.BOOL}
_CAST = _ALL | {TensorProto.UINT8}  # 8-bit images enter and leave a network through a Cast alone
_QUANTISED = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1})
_DOUBLE = TensorProto.DOUBLE

_OPERATORS: dict[frozenset[int], str] = {
    _FLOATS: """Acos Asin Atan Attention AveragePool BatchNormalization Ceil Clip Conv ConvTranspose Cos CumSum
        Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GroupNormalization HardSigmoid HardSwish
        InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul MaxPool PRelu
        QuantizeLinear RMSNormalization Reciprocal Resize RotaryEmbedding Round Selu Sigmoid Sin Softmax Softplus
        Sqrt Tan Tanh""",
    _NUMBERS: """Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max
        Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK""",
    _ALL: """Concat Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice Split Squeeze
        Tile Transpose Trilu Unsqueeze Where""",
    _ALL | _QUANTISED: "Constant ConstantOfShape",
    _CAST: "Cast CastLike",
    _QUANTISED: "DequantizeLinear",
    frozenset({TensorProto.BOOL}): "And Not Or Xor",
}
SUPPORTED: dict[str, frozenset[int]] = {
    operator: types for types, operators in _OPERATORS.items() for operator in operators.split()
}
"""Operator -> ONNX element types that its first input may have (its output, where it has no input)."""

_SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
OLDEST_FOR_OPSET_23 = max(_SINCE.values())
"""TensorRT's first release that takes what networks are exported to from that opset on."""


def check_operators(path: Path, version: str) -> None:
    """UserError naming the first node of the ONNX file that the parser of TensorRT `version` does not take."""
    model = onnx.load(path, load_external_data=False)
    types = _types(onnx.shape_inference.infer_shapes(model).graph)
    release = tuple(int(part) for part in version.split(".")[:2])
    for node in model.graph.node:
        for problem in _problems(node, types, release):
            raise UserError(
                f"{path.name}: TensorRT {version} does not take {node.op_type} {problem} (node {node.name!r})"
            )


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _problems(node: onnx.NodeProto, types: dict[str, int], release: tuple[int, ...]) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"of the domain {node.domain}"
    elif node.op_type not in SUPPORTED:
        yield "at all"
    elif release < (since := _SINCE.get(node.op_type, (0, 0))):
        yield f"before {since[0]}.{since[1]}; use a lower opset"
    else:
        yield from _type_problems(node, types)
        yield from _attribute_problems(node)


def _type_problems(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[str]:
    first = types.get(node.input[0] if node.input else node.output[0])
    if first == _DOUBLE:  # taken as float32
        first = TensorProto.FLOAT
    if first is not None and first not in SUPPORTED[node.op_type]:
        yield f"of {_name(first)}"
    touched = {types.get(name) for name in [*node.input, *node.output]}
    if TensorProto.UINT8 in touched and node.op_type not in ("Cast", "CastLike"):
        yield "of UINT8, which only a Cast may take or give"


def _attribute_problems(node: onnx.NodeProto) -> Iterator[str]:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Resize":
        if given.get("antialias"):
            yield "with antialias"
        if given.get("mode", b"nearest") not in (b"nearest", b"linear"):
            yield f"of mode {given['mode'].decode()}"
    if node.op_type == "Attention":
        if len(node.output) > 1 or any(node.input[4:]):
            yield "with a cache of keys and values"
        if given.get("softcap"):
            yield "with softcap"
    if node.op_type == "ScatterND" and given.get("reduction", b"none") != b"none":
        yield "with a reduction"
    if node.op_type in ("LayerNormalization", "MaxPool") and any(node.output[1:]):
        yield "with a second output"


def _name(element: int) -> str:
    return TensorProto.DataType.Name(element)
