"""The graphs of all networks, as the specs for TensorRT build them, against what its parser takes."""

from pathlib import Path

import onnx
import pytest

from ubgen.diffusion import load_stable_diffusion
from ubgen.export import load_spec
from ubgen.export.compilers.tensorrt_graph import onnx_graph
from ubgen.export.inputs import real_inputs
from ubgen.export.networks import Exportable, clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.precision import lower
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.rewards import Clip, QAlign

CASES = [
    ("text_encoder", 23, "10.14.1"),
    ("unet", 23, "10.14.1"),
    ("vae_decoder", 23, "10.14.1"),
    ("clip_image", 23, "10.14.1"),
    ("clip_text", 23, "10.14.1"),
    ("qalign", 23, "10.15.1"),
]


@pytest.fixture(scope="module")
def networks(family: dict[str, str], spec_file: Path) -> dict[str, Exportable]:
    sd = load_stable_diffusion(family["stable_diffusion"])
    real = real_inputs(sd, load_spec(spec_file, **family))
    return {
        **stable_diffusion_networks(sd, real),
        **clip_networks(Clip.load(family["clip"]), real),
        **qalign_networks(QAlign.load(family["qalign"]), real),
    }


@pytest.mark.parametrize(("name", "opset", "version"), CASES)
def test_the_parser_takes_the_half_precision_graph(
    networks: dict[str, Exportable], tmp_path: Path, name: str, opset: int, version: str
) -> None:
    network = networks[name]
    half = Exportable(lower(network.module, "float16"), network.inputs, network.output, network.constant)
    spec = NetworkSpec(BatchRange(1, 2, 4), 1e-2, "tensorrt", "float16", opset)
    # ONNX Runtime crashes on opening some of these graphs on a CPU, so their values are compared nowhere
    with onnx_graph(half, spec, tmp_path / name, version) as graph:
        model = onnx.load(graph)
        onnx.checker.check_model(model)
    assert any(node.op_type in ("Conv", "MatMul", "Gemm") for node in model.graph.node)
