"""Real compilers: what low precision breaks is compiled again in mixed precision, or refused."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.export.build import Candidate, compile_within_tolerance
from ubgen.export.exportable import Exportable
from ubgen.export.spec import BatchRange, NetworkSpec

SPEC = NetworkSpec(BatchRange(1, 4, 8), tolerance=2e-2, precision="float16")


class Block(nn.Module):
    """x + down(silu(norm(up(x)))): the norm hides how large `up` makes its values."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)
        with torch.no_grad():
            self.up.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.norm(self.up(x))))


class Network(nn.Module):
    def __init__(self, gains: Sequence[float]) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([Block(16, gain) for gain in gains])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def candidate(spec: NetworkSpec, gains: Sequence[float], shift: float = 0.0) -> Candidate:
    torch.manual_seed(0)
    network = Exportable(
        Network(gains).eval(), [{"x": torch.randn(6, 16)}, {"x": 3 * torch.randn(5, 16)}], "y"
    )
    return Candidate(
        "net", network, [network.reference(inputs) + shift for inputs in network.inputs], spec, "cpu"
    )


def test_weights_beyond_float16_on_onnx_runtime(tmp_path: Path) -> None:
    said: list[str] = []
    row, files = compile_within_tolerance(candidate(SPEC, [1, 1, 1e6, 1]), tmp_path, said.append)
    assert row.passed
    assert row.error_without is not None
    assert not row.error_without <= SPEC.tolerance
    assert row.kept_float32 == ("blocks.2.up", "blocks.2.norm")
    assert [file.name for file in files] == ["net.onnx"]
    assert [line for line in said if "compiling" in line] == [
        "net: compiling with onnxruntime in float16"
    ] * 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_values_beyond_float16_on_aotinductor(tmp_path: Path) -> None:
    """Here all weights fit, and what they compute does not."""
    spec = replace(SPEC, compiler="aotinductor")
    row, files = compile_within_tolerance(candidate(spec, [1, 1e5]), tmp_path, print)
    assert row.passed
    assert row.error_without == float("inf") or not row.error_without <= spec.tolerance  # type: ignore[operator]
    assert row.kept_float32 == ("blocks.1.up", "blocks.1.norm")
    assert [file.name for file in files] == ["net.pt2"]


def test_layers_of_the_spec_stay_and_are_reported(tmp_path: Path) -> None:
    spec = replace(SPEC, keep_float32=("blocks.0",))
    row, _ = compile_within_tolerance(candidate(spec, [1e6, 1]), tmp_path, print)
    assert (row.kept_float32, row.error_without) == (("blocks.0",), None)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_an_engine_that_is_wrong_for_another_reason_is_refused(tmp_path: Path, precision: str) -> None:
    spec = replace(SPEC, precision=precision)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^net: the engine differs from PyTorch by [\d.e-]+, more than the spec's"
    ):
        compile_within_tolerance(candidate(spec, [1, 1], shift=1.0), tmp_path, print)


def test_a_network_for_an_onnx_file_takes_no_memory_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_network(network: Exportable, *_: object) -> None:
        tensors = [*network.module.parameters(), *network.inputs[0].values()]
        raise UserError(f"all on {' and '.join({tensor.device.type for tensor in tensors})}")

    monkeypatch.setattr("ubgen.export.build.compile_network", compile_network)
    wanted = replace(candidate(SPEC, [1, 1]), spec=replace(SPEC, compiler="tensorrt"), device="cuda")
    with pytest.raises(UserError, match=r"^all on cpu$"):
        compile_within_tolerance(wanted, tmp_path, print)
