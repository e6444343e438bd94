"""The ONNX file that a TensorRT plan is built from, or refitted from, and what TensorRT's parser takes.

That is checked before a build, which would find it out an hour later and less clearly. The table is after the one of
supported operators that onnx-tensorrt publishes for TensorRT 10.15, opsets 9 to 24, as far as exported networks and
their quantised forms can need it. Newer releases take more, not less.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ubgen.core.errors import UserError
from ubgen.export.compilers import one_line
from ubgen.export.compilers.float8 import quantise
from ubgen.export.compilers.onnx import export_onnx
from ubgen.export.exportable import Exportable
from ubgen.export.spec import NetworkSpec

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


@contextmanager
def onnx_graph(network: Exportable, spec: NetworkSpec, path: Path, version: str) -> Iterator[Path]:
    """The network as an ONNX file, in a directory that goes when the block ends.

    UserError when the parser of TensorRT `version` would not take it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        with one_line(path.name, "the ONNX exporter"):
            graph = export_onnx(network, spec, Path(scratch, f"{path.name}.onnx"))[0]
        if spec.precision == "float8":
            with one_line(path.name, "the float8 quantiser"):
                graph = quantise(graph, network, spec.keep_float32, Path(scratch, f"{path.name}.float8.onnx"))
        cast_images(graph)
        check_operators(graph, version)
        yield graph


def cast_images(path: Path) -> None:
    """Let 8-bit inputs reach the graph as float32: TensorRT has no operator but Cast that reads them.

    An exported network casts its pixels first, but takes the batch's size from them as they are.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    images = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
    if not images:
        return
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in images:
                node.input[i] = f"{name}_float32"
    for name in sorted(images):
        cast = helper.make_node(
            "Cast", [name], [f"{name}_float32"], f"{name}_to_float32", to=TensorProto.FLOAT
        )
        graph.node.insert(0, cast)
    del graph.value_info[:]  # of the types that were there before
    onnx.save(model, path)


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
