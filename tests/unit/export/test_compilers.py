"""What the compilers are given, and what they refuse. AOTInductor is built and run in tests/unit/runtime."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.core.probes import modelopt
from ubgen.export.compilers import aotinductor, compile_network, one_line
from ubgen.export.compilers.float8 import calibration_rows, quantise
from ubgen.export.compilers.onnx import cast_images, tensorrt_graph
from ubgen.export.exportable import Exportable
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.runtime import Network
from ubgen.runtime.backends import backend

BATCH = BatchRange(1, 2, 8)


class Picture(nn.Module):
    """8-bit pixels in and out, and an input that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.middle = nn.Conv2d(64, 64, 3, padding=1)
        self.exact = nn.Conv2d(64, 64, 1)
        self.last = nn.Conv2d(64, 3, 1)

    def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
        images = pixels.float().permute(0, 3, 1, 2) / 255
        hidden = nn.functional.silu(self.middle(self.first(images.to(self.first.weight.dtype))))
        images = self.last(self.exact(hidden.float())) * scale * 8
        return (images.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


@pytest.fixture(scope="module")
def picture() -> Exportable:
    torch.manual_seed(0)
    inputs = [
        {"pixels": torch.randint(0, 256, (rows, 16, 16, 3), dtype=torch.uint8), "scale": torch.tensor([s])}
        for rows, s in ((5, 3.0), (2, 1.5))
    ]
    return Exportable(Picture().eval(), inputs, "out", frozenset({"scale"}))


def spec(compiler: str = "tensorrt", opset: int = 23, **changes: object) -> NetworkSpec:
    return NetworkSpec(BATCH, 1e-3, compiler, opset=opset, **changes)


def load(path: Path, network: Exportable) -> Network:
    return backend("onnxruntime").load("picture", path, network.signature(BATCH), "cpu", 1, {})


def assert_equal(network: Network, wanted: Exportable) -> None:
    for inputs in wanted.inputs:
        ours, reference = network.run(inputs)["out"], wanted.reference(inputs)
        assert ours.dtype == torch.uint8
        assert ((ours.int() - reference.int()).abs() <= 1).all()


def test_onnx_runtime_runs_what_was_written_and_nothing_else_is_left(
    picture: Exportable, tmp_path: Path
) -> None:
    files = compile_network(picture, spec("onnxruntime"), tmp_path / "picture", "cpu", print)
    assert list(tmp_path.iterdir()) == files == [tmp_path / "picture.onnx"]
    assert_equal(load(files[0], picture), picture)


def test_the_graph_for_tensorrt_casts_images_first_and_goes_away(picture: Exportable, tmp_path: Path) -> None:
    with tensorrt_graph(picture, spec(), tmp_path / "picture") as graph:
        assert_equal(load(graph, picture), picture)
        readers = [node.op_type for node in onnx.load(graph).graph.node if "pixels" in node.input]
        assert readers == ["Cast"]
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_images_is_left_alone() -> None:
    source, target = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", [source], [target])
    before = graph.SerializeToString()
    cast_images(graph)
    assert graph.SerializeToString() == before


def test_a_compilers_error_names_what_it_was_raised_from() -> None:
    """As Torch-TensorRT has it, whose last error shows the whole graph."""
    named = "Conversion of function torch._ops.aten.aten::_to_copy not currently supported!"
    with pytest.raises(UserError) as raised, one_line("unet", "Torch-TensorRT"):
        raise RuntimeError("Conversion of module GraphModule(\n) not supported") from TypeError(named)
    assert str(raised.value) == f"unet: Torch-TensorRT could not compile it: TypeError: {named}"


def test_on_a_gpu_aotinductor_is_asked_for_channels_last_and_traces_the_rows_that_it_is_tuned_for(
    picture: Exportable,
) -> None:
    wanted = NetworkSpec(BatchRange(1, 6, 8), 1e-3, "aotinductor")
    assert aotinductor.settings(wanted, "cuda") == {
        **aotinductor.settings(wanted, "cpu"),
        "force_layout_optimization": True,
    }
    for rows, traced in ((None, 2), (6, 6)):
        program = picture.program(wanted.batch, rows)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        assert nodes["pixels"].shape[0].node.hint == traced
        assert nodes["scale"].shape[0] == 1
        other = picture.repeated(7)
        assert torch.equal(program.module()(**other), picture.reference(other))


def test_too_little_memory_is_no_compilers_error() -> None:
    with pytest.raises(torch.OutOfMemoryError), one_line("unet", "AOTInductor"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("compiler", ["tensorrt", "torch_tensorrt"])
def test_a_compiler_that_cannot_serve_the_device_says_so(
    picture: Exportable, tmp_path: Path, compiler: str
) -> None:
    with pytest.raises(UserError, match=rf"^{compiler}: has no engines for the CPU$"):
        compile_network(picture, spec(compiler), tmp_path / "picture", "cpu", print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("compiler", ["tensorrt", "torch_tensorrt", "aotinductor", "onnxruntime"])
def test_without_a_gpu_each_compiler_says_what_is_missing(compiler: str) -> None:
    probe = backend(compiler).probe("cuda")
    assert not probe.available
    assert probe.detail


def test_float8_is_scaled_on_rows_of_all_real_inputs(picture: Exportable) -> None:
    rows = calibration_rows(picture)
    assert rows["pixels"].shape == (7, 16, 16, 3)
    assert rows["scale"].tolist() == [3.0] * 5 + [1.5] * 2
    assert np.array_equal(rows["pixels"][5], picture.inputs[1]["pixels"][0].numpy())


@pytest.mark.skipif(modelopt().available, reason="for machines without it")
def test_float8_without_the_quantiser_names_the_extra(picture: Exportable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'precision = "float8" needs modelopt.*\[tensorrt,float8\]'):
        quantise(tmp_path / "a.onnx", picture, (), tmp_path / "b.onnx")


@pytest.mark.skipif(not modelopt().available, reason=modelopt().detail)
def test_a_float8_graph_runs_and_leaves_the_kept_layers_alone(picture: Exportable, tmp_path: Path) -> None:
    """On the CPU, where ONNX Runtime converts to and from float8 as the nodes say."""
    module = copy.deepcopy(picture.module)
    module.first.half()
    module.middle.half()
    half = Exportable(module, picture.inputs, "out", picture.constant)
    quantised = spec(opset=20, precision="float8", keep_float32=("exact", "last"))
    with tensorrt_graph(half, quantised, tmp_path / "picture") as path:
        graph = onnx.load(path).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        assert TensorProto.FLOAT8E4M3FN in types.values()
        sources = {output: node for node in graph.node for output in node.output}
        weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
        assert [types.get(name) for name in weights] == [
            TensorProto.FLOAT16,
            None,
            TensorProto.FLOAT,
            TensorProto.FLOAT,
        ]
        assert sources[weights[1]].op_type == "DequantizeLinear"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for inputs in picture.inputs:
            ours = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
            error = np.abs(ours.astype(int) - picture.reference(inputs).numpy().astype(int))
            assert 0 < error.mean() < 3
    assert list(tmp_path.iterdir()) == []
