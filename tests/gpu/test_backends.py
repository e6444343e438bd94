"""Every compiler for a GPU: the same small network built by each, run eagerly and as a CUDA graph."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.export.compilers import compile_network
from ubgen.export.exportable import Exportable
from ubgen.export.spec import BatchRange, NetworkSpec, Options
from ubgen.runtime import Network
from ubgen.runtime.backends import backend
from ubgen.runtime.network import exact_float32

pytestmark = pytest.mark.gpu
BATCH = BatchRange(1, 4, 8)
BACKEND_OPTIONS = [
    ("onnxruntime", Options(provider="cuda")),
    ("onnxruntime", Options(provider="cuda", cuda_graphs=True)),
    ("aotinductor", Options()),
    ("aotinductor", Options(cuda_graphs=True)),
    ("tensorrt", Options()),
    ("tensorrt", Options(cuda_graphs=True)),
    ("tensorrt", Options(refit=True, optimization_level=0, workspace_gb=1)),
    ("torch_tensorrt", Options()),
    ("torch_tensorrt", Options(cuda_graphs=True)),
]
IDS = [f"{name}-{options.provider}{'-graphs' * options.cuda_graphs}" for name, options in BACKEND_OPTIONS]


class Small(nn.Module):
    """Convolution, group norm, attention; 8-bit pixels in, an input that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(8, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
        images = pixels.float().permute(0, 3, 1, 2).to(self.norm.weight.dtype) / 255
        tokens = nn.functional.silu(self.norm(self.convolution(images))).flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].float() * scale


@pytest.fixture(scope="module")
def network() -> Exportable:
    torch.manual_seed(0)
    return exportable(Small())


def exact(network: Exportable, inputs: Mapping[str, Tensor]) -> Tensor:
    """PyTorch's output; its convolutions would use TensorFloat-32, which misses the tolerances here by itself."""
    with exact_float32():
        return network.reference(inputs)


def exportable(module: nn.Module) -> Exportable:
    inputs = {
        "pixels": torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, device="cuda"),
        "scale": torch.tensor([2.0], device="cuda"),
    }
    return Exportable(module.eval().cuda(), [inputs], "out", frozenset({"scale"}))


def spec(compiler: str, options: Options, **changes: Any) -> NetworkSpec:
    return NetworkSpec(BATCH, 1e-3, compiler, options=options, **{"opset": 23, **changes})


def build(network: Exportable, wanted: NetworkSpec, directory: Path) -> Path:
    if not (probe := backend(wanted.compiler).probe("cuda")).available:
        pytest.skip(probe.detail)
    return compile_network(network, wanted, directory / "small", "cuda", print)[0]


def load(path: Path, network: Exportable, wanted: NetworkSpec) -> Network:
    options = wanted.options.__dict__
    return backend(wanted.compiler).load("small", path, network.signature(BATCH), "cuda", 1, options)


@pytest.fixture(scope="module", params=BACKEND_OPTIONS, ids=IDS)
def built(request: Any, network: Exportable, tmp_path_factory: Any) -> tuple[NetworkSpec, Path]:
    wanted = spec(*request.param)
    return wanted, build(network, wanted, tmp_path_factory.mktemp("built"))


def rows(network: Exportable, start: int, stop: int) -> dict[str, Tensor]:
    return network.rows(network.inputs[0], start, stop)


def test_equals_pytorch_at_every_size_and_again_as_a_replay(
    built: tuple[NetworkSpec, Path], network: Exportable
) -> None:
    engine = load(built[1], network, built[0])
    for size in (1, 3, 8, 3, 8, 1, 3, 8):
        for start in range(0, 8 - size + 1, 3):
            inputs = rows(network, start, start + size)
            out = engine.run(inputs)["out"]
            assert torch.allclose(out, exact(network, inputs), atol=2e-4)


def test_results_of_earlier_calls_stay(built: tuple[NetworkSpec, Path], network: Exportable) -> None:
    engine = load(built[1], network, built[0])
    inputs = [rows(network, start, start + 2) for start in (0, 2, 4, 6)]
    outs = [engine.run(given)["out"] for given in inputs]
    for given, out in zip(inputs, outs, strict=True):
        assert torch.allclose(out, exact(network, given), atol=2e-4)


def test_runs_in_the_order_of_the_callers_stream(
    built: tuple[NetworkSpec, Path], network: Exportable
) -> None:
    """The input is only just being made when the call comes, and the output is read at once, without a wait."""
    engine = load(built[1], network, built[0])
    wanted = exact(network, rows(network, 0, 4))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            big = torch.randn(4096, 4096, device="cuda")
            for _ in range(5):
                big = big @ big / 4096
            late = (big.sum() * 0).nan_to_num().to(torch.uint8)
            inputs = rows(network, 0, 4)
            inputs["pixels"] = inputs["pixels"] + late
            out = engine.run(inputs)["out"] * 2
            assert torch.allclose(out, wanted * 2, atol=4e-4)


def test_memory_stays_flat(built: tuple[NetworkSpec, Path], network: Exportable) -> None:
    engine = load(built[1], network, built[0])
    for _ in range(500):
        engine.run(rows(network, 0, 4))
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    for _ in range(10_000):
        engine.run(rows(network, 0, 4))
    torch.cuda.synchronize()
    assert before[0] - torch.cuda.mem_get_info()[0] < 32 * 2**20
    assert torch.cuda.memory_allocated() == before[1]


@pytest.mark.parametrize("compiler", ["tensorrt", "torch_tensorrt", "aotinductor"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_truncated_engine_gets_one_line(
    network: Exportable, tmp_path: Path, compiler: str, part: float
) -> None:
    wanted = spec(compiler, Options())
    path = build(network, wanted, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=path.name) as raised:
        load(path, network, wanted)
    assert len(str(raised.value).splitlines()) == 1


def test_a_plan_of_another_network_or_range_is_refused(network: Exportable, tmp_path: Path) -> None:
    wanted = spec("tensorrt", Options())
    path = build(network, wanted, tmp_path)
    other = Exportable(network.module, network.inputs, "other", network.constant)
    with pytest.raises(UserError, match="its tensors are"):
        load(path, other, wanted)
    larger = network.signature(BatchRange(1, 4, 16))
    with pytest.raises(UserError, match="its pixels is not the uint8"):
        backend("tensorrt").load("small", path, larger, "cuda", 1, {})


def test_new_weights_are_put_into_a_plan_without_a_build(network: Exportable, tmp_path: Path) -> None:
    wanted = spec("tensorrt", Options(refit=True))
    base = build(network, wanted, tmp_path)
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    changed = Exportable(module, network.inputs, "out", network.constant)
    said: list[str] = []
    path = compile_network(changed, wanted, tmp_path / "new", "cuda", said.append, base)[0]
    assert said == []
    for _ in range(2):  # and once more: what was refitted can be refitted
        inputs = rows(network, 0, 4)
        out = load(path, changed, wanted).run(inputs)["out"]
        assert torch.allclose(out, exact(changed, inputs), atol=2e-4)
        assert not torch.allclose(out, exact(network, inputs), atol=1e-2)
        path = compile_network(changed, wanted, tmp_path / "again", "cuda", said.append, path)[0]


@pytest.mark.parametrize("compiler", ["tensorrt", "torch_tensorrt", "aotinductor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inside_float32_outside(
    network: Exportable, tmp_path: Path, compiler: str, dtype: torch.dtype
) -> None:
    half = exportable(copy.deepcopy(network.module).to(dtype))
    wanted = spec(compiler, Options(), precision=str(dtype).removeprefix("torch."))
    inputs = rows(half, 0, 4)
    out = load(build(half, wanted, tmp_path), half, wanted).run(inputs)["out"]
    assert out.dtype == torch.float32
    reference = exact(network, inputs)
    assert (out - reference).abs().max() < 0.05 * reference.abs().max()


def test_a_float8_plan(network: Exportable, tmp_path: Path) -> None:
    if not probes.modelopt().available:
        pytest.skip(probes.modelopt().detail)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    half = exportable(copy.deepcopy(network.module).half())
    wanted = spec("tensorrt", Options(), precision="float8", opset=20)
    inputs = rows(half, 0, 4)
    out = load(build(half, wanted, tmp_path), half, wanted).run(inputs)["out"]
    reference = exact(network, inputs)
    assert (out - reference).abs().max() < 0.2 * reference.abs().max()
