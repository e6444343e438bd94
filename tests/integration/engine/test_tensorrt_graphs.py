"""The graphs of all networks as the specs for TensorRT build them: what its parser takes, with PyTorch's values."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from ubgen.core.probes import modelopt
from ubgen.diffusion import load_stable_diffusion
from ubgen.export import load_spec
from ubgen.export.compilers.onnx import SPLIT, tensorrt_graph
from ubgen.export.exportable import Exportable
from ubgen.export.inputs import real_inputs
from ubgen.export.mixed_precision import lower
from ubgen.export.networks import clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.parity import row_errors
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.rewards import Clip, QAlign

CASES = [
    ("text_encoder", 23, (10, 14)),
    ("unet", 23, (10, 14)),
    pytest.param("unet", 20, (10, 12), marks=pytest.mark.slow),
    ("vae_decoder", 23, (10, 14)),
    ("clip_image", 23, (10, 14)),
    ("clip_text", 23, (10, 14)),
    ("qalign", 23, (10, 15)),
]

# After the table of supported operators that onnx-tensorrt publishes for TensorRT 10.15, opsets 9 to 24, as far as
# exported networks and their quantised forms can need it. Newer releases take more, not less.
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
NUMBERS = FLOATS | {TensorProto.INT32, TensorProto.INT64}
ALL = NUMBERS | {TensorProto.BOOL}
CAST = ALL | {TensorProto.UINT8}  # 8-bit images enter and leave a network through a Cast alone
QUANTISED = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1})

OPERATORS: dict[frozenset[int], str] = {
    FLOATS: """Acos Asin Atan Attention AveragePool BatchNormalization Ceil Clip Conv ConvTranspose Cos CumSum
        Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GroupNormalization HardSigmoid HardSwish
        InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul MaxPool PRelu
        QuantizeLinear RMSNormalization Reciprocal Resize RotaryEmbedding Round Selu Sigmoid Sin Softmax Softplus
        Sqrt Tan Tanh""",
    NUMBERS: """Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max
        Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK""",
    ALL: """Concat Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice Split Squeeze
        Tile Transpose Trilu Unsqueeze Where""",
    ALL | QUANTISED: "Constant ConstantOfShape",
    CAST: "Cast CastLike",
    QUANTISED: "DequantizeLinear",
    frozenset({TensorProto.BOOL}): "And Not Or Xor",
}
SUPPORTED: dict[str, frozenset[int]] = {
    operator: types for types, operators in OPERATORS.items() for operator in operators.split()
}
"""Operator -> ONNX element types that its first input may have (its output, where it has no input)."""

SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}


@pytest.fixture(scope="module")
def networks(family: dict[str, str], spec_file: Path) -> dict[str, Exportable]:
    sd = load_stable_diffusion(family["stable_diffusion"])
    real = real_inputs(sd, load_spec(spec_file, **family))
    clip = Clip.load(family["clip"])
    return {
        **stable_diffusion_networks(sd, real.input_ids, real.unet_calls, real.latents),
        **clip_networks(clip, real.pixels, clip.tokenizer(real.names)),
        **qalign_networks(QAlign.load(family["qalign"]), real.pixels),
    }


@pytest.mark.parametrize(("name", "opset", "version"), CASES)
def test_the_parser_takes_the_half_precision_graph(
    networks: dict[str, Exportable], tmp_path: Path, name: str, opset: int, version: tuple[int, int]
) -> None:
    network = networks[name]
    half = replace(network, module=lower(network.module, "float16"))
    spec = NetworkSpec(BatchRange(1, 2, 4), 1e-2, "tensorrt", "float16", opset)
    with tensorrt_graph(half, spec, tmp_path / name) as graph:
        assert list(problems(graph, version)) == []
        without_tensorrts_own_attribute(graph)
        model = onnx.load(graph)
        onnx.checker.check_model(model)
        products = [n for n in model.graph.node if n.op_type in ("Attention", "Conv", "Gemm", "MatMul")]
        weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        read = {weights[value] for node in products for value in node.input if value in weights}
        assert TensorProto.FLOAT16 in read
        assert_like(graph, network, 1e-2)
        if (name, opset) == ("unet", 23):
            assert_shared(onnx.shape_inference.infer_shapes(model).graph)


def without_tensorrts_own_attribute(path: Path) -> None:
    """Attention must carry it, since not every GPU has a fused kernel for it; nothing but TensorRT knows it."""
    model = onnx.load(path)
    for node in model.graph.node:
        own = [attribute for attribute in node.attribute if attribute.name == SPLIT]
        assert [attribute.i for attribute in own] == [1] * (node.op_type == "Attention")
        for attribute in own:
            node.attribute.remove(attribute)
    onnx.save(model, path)


def assert_shared(graph: onnx.GraphProto) -> None:
    """What comes before the first cross-attention is computed on B rows, not on guidance's 2B."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    rows = {name: shape[0].dim_param for name, shape in shapes.items() if shape}
    first, second, *_ = (node.output[0] for node in graph.node if node.op_type == "Attention")
    assert (rows[first], rows[second]) == ("batch", "2*batch")


@pytest.mark.skipif(not modelopt().available, reason=modelopt().detail)
def test_the_float8_unet_is_quantised_where_it_is_emulated(
    networks: dict[str, Exportable], tmp_path: Path
) -> None:
    """As sd15-fp8 has it. Mending searches on the emulation, so the two must err alike: 1.5 to 1.8 to 1 here."""
    network = networks["unet"]
    kept = ("unet.conv_in", "unet.conv_out", "unet.time_embedding")
    half, emulated = (
        replace(network, module=lower(network.module, "float8", kept, emulate_float8=emulate))
        for emulate in (False, True)
    )
    spec = NetworkSpec(BatchRange(1, 2, 4), 2e-1, "tensorrt", "float8", 20, keep_float32=kept)
    with tensorrt_graph(half, spec, tmp_path / "unet") as graph:
        assert list(problems(graph, (10, 14))) == []
        nodes = onnx.load(graph).graph.node
        scaled = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
        exact = [n for n in nodes if n.op_type in ("Conv", "Gemm") and n.input[0] not in scaled]
        assert len(exact) == 4  # two convolutions, and two layers of the time embedding
        assert sum(node.op_type == "Gemm" and node.input[1] in scaled for node in nodes) >= 5
        for rows, ours in run(graph, network):
            wanted = network.reference(rows)
            errors = [
                float((side - wanted).norm() / wanted.norm()) for side in (ours, emulated.reference(rows))
            ]
            assert errors[1] / 2.5 < errors[0] < 2.5 * errors[1]
            assert errors[0] < 0.3


def assert_like(graph: Path, network: Exportable, tolerance: float) -> None:
    for rows, ours in run(graph, network):
        wanted = network.reference(rows)
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        assert row_errors(ours, wanted).max() < tolerance


def run(graph: Path, network: Exportable) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Some rows of each real input with ONNX Runtime's output, in float32 between casts where it has no other kernel.

    Without its optimiser, whose fusion of a transposition into a float16 product crashes on a CPU.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for inputs in network.inputs:
        rows = network.rows(inputs, 0, 3)
        yield rows, torch.from_numpy(session.run(None, {name: rows[name].numpy() for name in rows})[0])


@pytest.mark.parametrize(
    ("operator", "element", "attributes", "problem"),
    [
        ("NonZero", TensorProto.FLOAT, {}, "NonZero at all"),
        (
            "QuickGelu",
            TensorProto.FLOAT,
            {"domain": "com.microsoft"},
            "QuickGelu of the domain com.microsoft",
        ),
        ("Sigmoid", TensorProto.INT64, {}, "Sigmoid of INT64"),
        ("Transpose", TensorProto.UINT8, {}, "Transpose of UINT8"),
        ("Resize", TensorProto.FLOAT, {"antialias": 1, "mode": "linear"}, "Resize with antialias"),
        ("RotaryEmbedding", TensorProto.FLOAT, {}, "RotaryEmbedding before 10.15"),
    ],
)
def test_what_the_parser_does_not_take_is_found(
    tmp_path: Path, operator: str, element: int, attributes: dict[str, object], problem: str
) -> None:
    source, target = (helper.make_tensor_value_info(name, element, ["batch", 3, 4, 4]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)], "graph", [source], [target]
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "a.onnx")
    assert problem in next(problems(tmp_path / "a.onnx", (10, 14)))


def problems(path: Path, release: tuple[int, int]) -> Iterator[str]:
    """What the parser of that TensorRT release does not take of an ONNX file, one line for each node."""
    model = onnx.load(path, load_external_data=False)
    types = types_of(onnx.shape_inference.infer_shapes(model).graph)
    for node in model.graph.node:
        yield from (f"{node.op_type} {problem}" for problem in node_problems(node, types, release))


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def node_problems(node: onnx.NodeProto, types: dict[str, int], release: tuple[int, ...]) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"of the domain {node.domain}"
    elif node.op_type not in SUPPORTED:
        yield "at all"
    elif release < (since := SINCE.get(node.op_type, (0, 0))):
        yield f"before {since[0]}.{since[1]}; use a lower opset"
    else:
        yield from type_problems(node, types)
        yield from attribute_problems(node)


def type_problems(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[str]:
    first = types.get(node.input[0] if node.input else node.output[0])
    if first == TensorProto.DOUBLE:  # taken as float32
        first = TensorProto.FLOAT
    if first is not None and first not in SUPPORTED[node.op_type]:
        yield f"of {TensorProto.DataType.Name(first)}"
    touched = {types.get(name) for name in [*node.input, *node.output]}
    if TensorProto.UINT8 in touched and node.op_type not in ("Cast", "CastLike"):
        yield "of UINT8, which only a Cast may take or give"


def attribute_problems(node: onnx.NodeProto) -> Iterator[str]:
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
