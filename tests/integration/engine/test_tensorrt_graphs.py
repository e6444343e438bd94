"""The graphs of all networks as the specs for TensorRT build them: what its parser takes, with PyTorch's values."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from ubgen.core.probes import modelopt
from ubgen.diffusion import load_stable_diffusion
from ubgen.export import load_spec
from ubgen.export.compilers.tensorrt_graph import onnx_graph
from ubgen.export.exportable import Exportable
from ubgen.export.inputs import real_inputs
from ubgen.export.mixed_precision import lower
from ubgen.export.networks import clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.parity import row_errors
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.rewards import Clip, QAlign

CASES = [
    ("text_encoder", 23, "10.14.1"),
    ("unet", 23, "10.14.1"),
    pytest.param("unet", 20, "10.12.0", marks=pytest.mark.slow),
    ("vae_decoder", 23, "10.14.1"),
    ("clip_image", 23, "10.14.1"),
    ("clip_text", 23, "10.14.1"),
    ("qalign", 23, "10.15.1"),
]


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
    networks: dict[str, Exportable], tmp_path: Path, name: str, opset: int, version: str
) -> None:
    network = networks[name]
    half = replace(network, module=lower(network.module, "float16"))
    spec = NetworkSpec(BatchRange(1, 2, 4), 1e-2, "tensorrt", "float16", opset)
    with onnx_graph(half, spec, tmp_path / name, version) as graph:
        model = onnx.load(graph)
        onnx.checker.check_model(model)
        products = [n for n in model.graph.node if n.op_type in ("Attention", "Conv", "Gemm", "MatMul")]
        weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        read = {weights[value] for node in products for value in node.input if value in weights}
        assert onnx.TensorProto.FLOAT16 in read
        assert_like(graph, network, 1e-2)
        if (name, opset) == ("unet", 23):
            assert_shared(onnx.shape_inference.infer_shapes(model).graph)


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
    with onnx_graph(half, spec, tmp_path / "unet", "10.14.1") as graph:
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
