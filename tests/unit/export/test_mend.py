"""The layers that low precision breaks are found, and no others."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ubgen.export.mend import offending_layers, smallest
from ubgen.export.networks import Exportable
from ubgen.export.precision import lower, record_calls
from ubgen.export.spec import BatchRange, NetworkSpec

SPEC = NetworkSpec(BatchRange(1, 2, 4), tolerance=2e-2, precision="float16")


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
    def __init__(self, loud: Sequence[int], blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([Block(16, 1e5 if i in loud else 1.0) for i in range(blocks)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def exportable(network: nn.Module) -> tuple[Exportable, list[Tensor]]:
    result = Exportable(network.eval(), [{"x": torch.randn(6, 16)}, {"x": 3 * torch.randn(5, 16)}], "y")
    return result, [result.reference(inputs) for inputs in result.inputs]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("needed", [{0}, {7}, {2, 3}, {1, 6}, {0, 4, 9}, set(range(10))])
def test_the_smallest_part_that_passes(needed: set[int]) -> None:
    tried: list[int] = []

    def passes(part: Sequence[str]) -> bool:
        tried.append(len(part))
        return needed <= {int(name) for name in part}

    assert {int(name) for name in smallest([str(i) for i in range(10)], passes)} == needed
    assert len(tried) <= 30


@pytest.mark.parametrize("loud", [[5], [1, 6]])
def test_the_layers_inside_the_blocks_are_found(loud: list[int]) -> None:
    """`up` overflows, and `norm` must take its float32 result."""
    network, expected = exportable(Network(loud))
    said: list[str] = []
    kept = offending_layers(network, expected, SPEC, "cpu", said.append)
    assert kept == tuple(f"blocks.{i}.{part}" for i in loud for part in ("up", "norm"))
    assert said
    mended = lower(network.module, "float16", kept, record_calls(network.module, network.inputs[0]))
    with torch.no_grad():
        assert torch.allclose(
            mended(network.inputs[1]["x"]), expected[1], atol=2e-2 * float(expected[1].abs().max())
        )


def test_what_low_precision_does_not_cause_is_not_blamed_on_it() -> None:
    network, expected = exportable(Network([]))
    assert offending_layers(network, expected, SPEC, "cpu", print) == ()
    wrong = [wanted + 1 for wanted in expected]
    assert offending_layers(network, wrong, SPEC, "cpu", print) == ()


class Scarce(Network):
    """Runs out of memory when a lowered copy has its end in float32, as on a GPU that holds no more of it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.head._forward_pre_hooks_with_kwargs and self.head.weight.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_too_little_memory_is_not_taken_for_layers_that_do_not_help() -> None:
    network, expected = exportable(Scarce([3]))
    with pytest.raises(torch.OutOfMemoryError):
        offending_layers(network, expected, SPEC, "cpu", print)
