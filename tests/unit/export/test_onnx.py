"""The ONNX graph of a network, and the passes that fit it to ONNX Runtime's CPU kernels."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from onnx import parser
from torch import Tensor

from ubgen.diffusion import load_stable_diffusion
from ubgen.export.compilers.onnx import export_onnx
from ubgen.export.compilers.onnx_passes import compute_equal_rows_once, fit_cpu, fit_cuda
from ubgen.export.exportable import Exportable
from ubgen.export.networks import UNet
from ubgen.export.spec import BatchRange, NetworkSpec, Options

RTOL = 1e-5  # of the largest value
BATCH = BatchRange(1, 2, 8)


def random_unet() -> UNet2DConditionModel:
    """SD1.x's blocks at one resolution; every norm and bias drawn too, since equal tensors are stored once."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for parameter in unet.requires_grad_(False).parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return unet


def draw(unet: UNet2DConditionModel, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    config = unet.config
    context = torch.randn(rows + 1, 7, config.cross_attention_dim, generator=generator)
    size = config.sample_size
    return {
        "latents": torch.randn(rows, config.in_channels, size, size, generator=generator),
        "timestep": torch.randint(0, 1000, (rows,), generator=generator).float(),
        "cond": context[:rows],
        "uncond": context[rows:],
        "guidance": torch.tensor([2.0]),
    }


def export(unet: UNet2DConditionModel, path: Path, options: Options, compiler: str = "onnxruntime") -> Path:
    network = Exportable(UNet(unet).eval(), [draw(unet, 2)], "noise", frozenset({"uncond", "guidance"}))
    return export_onnx(network, NetworkSpec(BATCH, RTOL, compiler, opset=23, options=options), path)[0]


def run(model: Path | bytes, inputs: Mapping[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def assert_equal_to_pytorch(file: Path, unet: UNet2DConditionModel) -> None:
    for rows in (1, 2, 5, 8):
        given = draw(unet, rows)
        with torch.no_grad():
            expected = UNet(unet).eval()(**given)
        torch.testing.assert_close(
            run(file, given), expected, rtol=0, atol=RTOL * float(expected.abs().max())
        )


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def gated(graph: ir.Graph) -> list[ir.Node]:
    """The operators that split the result of a GEGLU's linear layer."""
    return [
        node
        for node in graph
        if node.op_type == "Split" and {use.op_type for use, _ in node.outputs[1].uses()} == {"Gelu"}
    ]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return random_unet()


@pytest.fixture(scope="module")
def standard(unet, tmp_path_factory) -> Path:
    return export(unet, tmp_path_factory.mktemp("standard") / "unet.onnx", Options(), "tensorrt")


@pytest.fixture(scope="module")
def cuda(unet, tmp_path_factory) -> Path:
    return export(unet, tmp_path_factory.mktemp("cuda") / "unet.onnx", Options(provider="cuda"))


@pytest.fixture(scope="module")
def fitted(unet, tmp_path_factory) -> ir.Model:
    return ir.load(export(unet, tmp_path_factory.mktemp("cpu") / "unet.onnx", Options(provider="cpu")))


def test_the_graph_for_tensorrt_is_standard_onnx(standard, unet):
    model = onnx.load(standard)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert operators(ir.from_proto(model))["Attention"] == len(unet.attn_processors)
    assert_equal_to_pytorch(standard, unet)


def test_the_graph_for_the_cpu_equals_pytorch_at_every_batch(fitted, unet, tmp_path):
    ir.save(fitted, tmp_path / "fitted.onnx")
    assert b"site-packages" not in (tmp_path / "fitted.onnx").read_bytes()  # no traces of where it was made
    assert_equal_to_pytorch(tmp_path / "fitted.onnx", unet)


def test_attention_and_group_norm_become_operators_with_kernels(fitted, standard, unet):
    before, after = operators(ir.load(standard)), operators(fitted)
    attentions = len(unet.attn_processors)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())
    assert (before["Attention"], before["GroupNormalization"]) == (attentions, norms)
    assert (after["MultiHeadAttention"], after["InstanceNormalization"]) == (attentions, norms)
    assert after["BatchNormalization"] == norms
    assert not after.keys() & {"Attention", "GroupNormalization", "Softmax"}
    transformers = sum(isinstance(module, Transformer2DModel) for module in unet.modules())
    assert after["Transpose"] == 2 * transformers  # into and out of each


def test_the_graph_for_onnx_runtimes_cuda_provider_has_its_operators_and_pytorchs_values(cuda, unet):
    count = operators(ir.load(cuda))
    assert count["MultiHeadAttention"] == len(unet.attn_processors)
    assert count["InstanceNormalization"] == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert not count.keys() & {"Attention", "GroupNormalization", "BatchNormalization", "Softmax"}
    assert_equal_to_pytorch(cuda, unet)


def test_what_guidance_shares_is_computed_once_for_each_image(fitted, unet):
    rows = Counter(
        str(node.outputs[0].shape[0]) for node in fitted.graph if node.op_type == "MultiHeadAttention"
    )
    # one self-attention comes before the first cross-attention
    assert rows == {"batch": 1, "2*batch": len(unet.attn_processors) - 1}
    convolutions = [str(n.outputs[0].shape[0]) for n in fitted.graph if n.op_type == "Conv"]
    assert convolutions[:4] == ["batch"] * 4  # the first, a residual block's two, and into the transformer
    assert set(convolutions[4:]) == {"2*batch"}


def test_linear_layers_with_a_bias_add_it_themselves_and_nothing_splits_their_result(fitted, standard, unet):
    blocks = [part for part in unet.modules() if isinstance(part, BasicTransformerBlock)]
    assert len(gated(ir.load(standard).graph)) == len(blocks) > 0
    assert not gated(fitted.graph)
    # out of both attentions, both halves of the GEGLU, and out of the feed-forward part
    before, after = operators(ir.load(standard)), operators(fitted)
    assert after["Gemm"] - before["Gemm"] == 5 * len(blocks)
    inputs = {node.inputs[0].producer().op_type for node in fitted.graph if node.op_type == "Add"}
    assert "MatMul" not in inputs


def test_a_row_is_the_same_bits_wherever_it_is_in_a_batch(fitted, unet, tmp_path):
    ir.save(fitted, tmp_path / "fitted.onnx")
    given = draw(unet, 8)
    whole = run(tmp_path / "fitted.onnx", given)
    for rows in ([0, 1, 2], [5, 6, 7], [7, 0, 4, 2], [3]):
        some = {name: value[rows] if len(value) == 8 else value for name, value in given.items()}
        assert torch.equal(run(tmp_path / "fitted.onnx", some), whole[rows])


def test_inputs_outputs_and_weights_keep_their_names(fitted, standard):
    before = ir.load(standard).graph
    assert [v.name for v in fitted.graph.inputs] == [v.name for v in before.inputs]
    assert [v.name for v in fitted.graph.outputs] == [v.name for v in before.outputs]
    matrices = {name for name, value in before.initializers.items() if value.shape.rank() > 1}
    cut = {node.inputs[0].producer().inputs[0].producer().inputs[1].name for node in gated(before)}
    assert cut <= matrices
    assert matrices - fitted.graph.initializers.keys() == cut


@pytest.mark.slow
def test_the_miniature_exports_for_the_cpu_and_equals_pytorch(tmp_path):
    unet = load_stable_diffusion("ubgen:miniature/weights/stable-diffusion").unet
    file = export(unet, tmp_path / "unet.onnx", Options())
    count = operators(ir.load(file))
    assert count["MultiHeadAttention"] == len(unet.attn_processors)
    assert not count.keys() & {"Attention", "GroupNormalization", "Softmax"}
    assert_equal_to_pytorch(file, unet)


def attention_model(attributes: str = "", mask: str = "") -> onnx.ModelProto:
    """Heads split, attention, heads merged, as the exporter writes them."""
    text = f"""
    <ir_version: 10, opset_import: ["": 23]>
    main (float[b,6,16] q, float[b,6,16] k, float[b,6,16] v) => (float[b,6,16] out)
    <int64[4] split = {{-1,6,4,4}}, int64[3] merge = {{-1,6,16}}, float[6,6] mask = {{{",".join("0" * 36)}}},
     float[b,6,4,4] qs, float[b,6,4,4] ks, float[b,6,4,4] vs, float[b,4,6,4] qh, float[b,4,6,4] kh,
     float[b,4,6,4] vh, float[b,4,6,4] a, float[b,6,4,4] t>
    {{
        qs = Reshape(q, split)
        ks = Reshape(k, split)
        vs = Reshape(v, split)
        qh = Transpose<perm=[0,2,1,3]>(qs)
        kh = Transpose<perm=[0,2,1,3]>(ks)
        vh = Transpose<perm=[0,2,1,3]>(vs)
        a = Attention{attributes}(qh, kh, vh{mask})
        t = Transpose<perm=[0,2,1,3]>(a)
        out = Reshape(t, merge)
    }}"""
    return parser.parse_model(text)


@pytest.mark.parametrize(
    ("attributes", "mask", "fused"),
    [
        ("", "", True),
        ("<scale=0.3>", "", True),
        ("<is_causal=1>", "", False),
        ("<softcap=2.0>", "", False),
        ("", ", mask", False),
    ],
)
def test_only_plain_attention_is_fused(attributes, mask, fused):
    proto = attention_model(attributes, mask)
    model = ir.from_proto(proto)
    fit_cpu(model)
    assert (operators(model)["MultiHeadAttention"] == 1) == fused
    given = {name: torch.randn(3, 6, 16) for name in "qkv"}
    torch.testing.assert_close(
        run(ir.to_proto(model).SerializeToString(), given), run(proto.SerializeToString(), given)
    )


def half_block() -> onnx.ModelProto:
    """The attention of `attention_model` and a group norm, in float16."""
    norm = """
    <ir_version: 10, opset_import: ["": 23]>
    main (float[b,8,2,3] image) => (float[b,8,2,3] normal)
    <float[8] weight = {1.0,2.0,0.5,4.0,1.0,2.0,0.5,4.0}, float[8] bias = {0.0,1.0,-1.0,2.0,0.5,3.0,-2.0,1.0}>
    { normal = GroupNormalization<num_groups=2, epsilon=1e-5>(image, weight, bias) }"""
    whole = onnx.compose.merge_models(attention_model(), parser.parse_model(norm), io_map=[])
    for value in (*whole.graph.input, *whole.graph.value_info, *whole.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in whole.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))
    return whole


def test_half_precision_is_rewritten_for_the_gpu_alone():
    proto = half_block()
    kept, rewritten = ir.from_proto(proto), ir.from_proto(proto)
    fit_cpu(kept)
    fit_cuda(rewritten)
    assert (operators(kept)["Attention"], operators(kept)["GroupNormalization"]) == (1, 1)
    assert operators(rewritten)["MultiHeadAttention"] == operators(rewritten)["InstanceNormalization"] == 1
    shapes = {**dict.fromkeys("qkv", (3, 6, 16)), "image": (3, 8, 2, 3)}
    given = {name: torch.randn(shape).half().numpy() for name, shape in shapes.items()}
    results = [
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, given
        )
        for model in (proto, ir.to_proto(rewritten))
    ]
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(wanted), rtol=2e-3, atol=2e-3)


def linear_model(body: str, constants: str = "") -> onnx.ModelProto:
    """A linear layer of 3 to 4 channels, from `x` to `y`, then `body`, from there to `out`."""
    return parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": 23]>
    main (float[b,5,3] x, float[b,s,3] free) => (float[b,n,m] out)
    <float[3,4] w = {{1.0,-2.0,3.0,4.0,-5.0,6.0,7.0,8.0,-9.0,1.0,2.0,-3.0}}, float[4] bias = {{0.5,-0.25,2.0,3.0}},
     float[5,4] table = {{{",".join(f"{i}.5" for i in range(20))}}}, float[b,5,4] xw, float[b,5,4] y {constants}>
    {{
        {body}
    }}""")


LINEAR = "xw = MatMul(x, w)\n y = Add(xw, bias)\n"


@pytest.mark.parametrize(
    ("body", "constants", "gemms", "splits"),
    [
        pytest.param(LINEAR + "out = Identity(y)", "", 1, 0, id="linear"),
        pytest.param(LINEAR + "p, q = Split<axis=2, num_outputs=2>(y)\n out = Mul(p, q)", "", 2, 0, id="gated"),
        pytest.param(LINEAR + "p, q = Split<axis=-1, num_outputs=2>(y)\n out = Sub(q, p)", "", 2, 0, id="from the end"),
        pytest.param(LINEAR + "p, q = Split<axis=1, num_outputs=2>(y)\n out = Concat<axis=1>(q, p)", "", 1, 1,
                     id="split by position"),
        pytest.param(LINEAR + "p, q, r = Split<axis=2, num_outputs=3>(y)\n out = Concat<axis=2>(r, p, q)", "", 1, 1,
                     id="split in three"),
        pytest.param(LINEAR + "p, q = Split<axis=2>(y, sizes)\n out = Concat<axis=2>(q, p)",
                     ", int64[2] sizes = {1,3}", 1, 1, id="unequal parts"),
        pytest.param(LINEAR + "p, q = Split<axis=2, num_outputs=2>(y)\n o = Mul(p, q)\n out = Concat<axis=2>(o, y)", "",
                     1, 1, id="the whole is read too"),
        pytest.param("y = Add(x, x)\n xw = MatMul(y, w)\n out = Add(xw, table)", "", 0, 0, id="one bias per position"),
        pytest.param("xw = MatMul(free, w)\n out = Add(xw, bias)", "", 0, 0, id="free length"),
        pytest.param("xw = MatMul(x, w)\n y = Add(xw, bias)\n out = Mul(xw, y)", "", 0, 0, id="read before the bias"),
    ],
)  # fmt: skip
def test_linear_layers_are_rewritten_where_they_fit(body, constants, gemms, splits):
    proto = linear_model(body, constants)
    model = ir.from_proto(proto)
    fit_cpu(model)
    assert (operators(model)["Gemm"], operators(model)["Split"]) == (gemms, splits)
    for batch in (1, 3):
        given = {"x": torch.randn(batch, 5, 3), "free": torch.randn(batch, 4, 3)}
        torch.testing.assert_close(
            run(ir.to_proto(model).SerializeToString(), given), run(proto.SerializeToString(), given)
        )


def test_a_large_result_gets_its_bias_from_a_pass_of_its_own():
    rows = 2**16
    proto = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": 23]>
    main (float[b,{rows},2] x, float[b,{rows + 1},2] larger) => (float[b,{rows},4] out, float[b,{rows + 1},4] other)
    <float[2,4] w = {{1.0,-2.0,3.0,4.0,-5.0,6.0,7.0,8.0}}, float[4] bias = {{0.5,-0.25,2.0,3.0}}>
    {{
        a = MatMul(x, w)
        out = Add(a, bias)
        c = MatMul(larger, w)
        other = Add(c, bias)
    }}""")
    model = ir.from_proto(proto)
    fit_cpu(model)
    count = operators(model)
    assert (count["Gemm"], count["MatMul"], count["Add"]) == (1, 1, 1)


def doubled(body: str, constants: str = "") -> onnx.ModelProto:
    """A graph from `x` to `out`, in which the rows of `xx` are those of `x` twice over."""
    return parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": 23]>
    main (float[rows,6] x) => (float[twice,n] out)
    <float[twice,6] xx {constants}>
    {{
        xx = Concat<axis=0>(x, x)
        {body}
    }}""")


def fit_rows(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    compute_equal_rows_once(model.graph)
    return model


def assert_same_values(model: ir.Model, proto: onnx.ModelProto) -> None:
    given = {"x": torch.randn(4, 6)}
    torch.testing.assert_close(
        run(ir.to_proto(model).SerializeToString(), given), run(proto.SerializeToString(), given)
    )


def test_what_works_row_by_row_is_computed_once():
    proto = doubled(
        """
        a = Reshape(xx, split)
        b = Transpose<perm=[0,2,1]>(a)
        c = LayerNormalization<axis=-1>(b, two, two)
        d = MatMul(c, square)
        e, f = Split<axis=1, num_outputs=2>(d)
        g = Slice(e, zero, one, minus_one)
        h = Concat<axis=-1>(g, g)
        i = Mul(h, two)
        j = Add(i, h)
        k = Reshape(j, flat)
        l = Gemm(k, wide)
        m = Unsqueeze(l, minus_one)
        n = Sigmoid(m)
        o = Reshape(n, flat)
        out = Identity(o)
        """,
        """, int64[3] split = {-1,2,3}, float[2] two = {0.5,2.0}, float[2,2] square = {1.0,2.0,3.0,4.0},
        int64[1] zero = {0}, int64[1] one = {1}, int64[1] minus_one = {-1}, int64[2] flat = {-1,4},
        float[4,4] wide = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0}""",
    )
    model = fit_rows(proto)
    last = next(node for node in model.graph if node.op_type == "Identity").inputs[0].producer()
    assert last.op_type == "Concat"
    while (
        last.op_type != "Reshape" or last.inputs[0].name != "x"
    ):  # all the way up to the input, nothing is doubled
        last = last.inputs[0].producer()
        assert last is not None
    assert_same_values(model, proto)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param("m = ReduceMean<keepdims=1>(xx, axis)\n out = Add(xx, m)", ", int64[1] axis = {0}", id="mean"),
        pytest.param("f = Reshape(xx, wide)\n g = Softmax(f)\n out = Reshape(g, back)",
                     ", int64[2] wide = {1,-1}, int64[2] back = {-1,6}", id="rows side by side"),
        pytest.param("f = Reshape(xx, wide)\n g = Softmax(f)\n out = Reshape(g, back)",
                     ", int64[2] wide = {-1,12}, int64[2] back = {-1,6}", id="rows in pairs"),
        pytest.param("out = Slice(xx, from, to, axis, step)",
                     ", int64[1] from = {0}, int64[1] to = {99}, int64[1] axis = {-2}, int64[1] step = {3}",
                     id="every third row"),
        pytest.param("out = CumSum(xx, axis)", ", int64 axis = {0}", id="running sum"),
        pytest.param("y = Sigmoid(x)\n z = Concat<axis=0>(x, y)\n out = Add(xx, z)", "", id="another tensor"),
        pytest.param("t = Transpose<perm=[1,0]>(xx)\n s = Softmax<axis=1>(t)\n out = Transpose<perm=[1,0]>(s)", "",
                     id="transposed"),
    ],
)  # fmt: skip
def test_rows_that_meet_stay_as_they_are(body, constants):
    proto = doubled(body, constants)
    assert_same_values(fit_rows(proto), proto)
