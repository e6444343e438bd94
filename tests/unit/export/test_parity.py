"""The parity gate measures the worst case and lets nothing wrong pass."""

import dataclasses

import torch
from torch import Tensor, nn

from ubgen.export.networks import Exportable
from ubgen.export.parity import check_parity
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.runtime import Network, Signature

SPEC = NetworkSpec(BatchRange(1, 2, 3), tolerance=1e-3)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Levels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.uint8)


class Compiled(Network):
    """Stands where a compiler's output would: PyTorch plus a chosen error."""

    def __init__(self, network: Exportable, error: Tensor | float) -> None:
        super().__init__("net", signature(network))
        self._network, self._error = network, error

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        result = self._network.reference(inputs)
        return {"y": (result + self._error).to(result.dtype)}


def signature(network: Exportable) -> Signature:
    return network.signature(SPEC.batch)


def test_difference_is_relative_to_the_largest_value() -> None:
    network = Exportable(Half(), [{"x": torch.full((5, 2), 8.0)}, {"x": torch.ones(2, 2)}], "y")
    row = check_parity("net", Compiled(network, 0.002), network, SPEC)
    assert row.rows == 5 + 1 + 2 + 1
    assert abs(row.max_abs - 0.002) < 1e-6
    assert abs(row.error - 0.0005) < 1e-6
    assert row.passed
    assert not check_parity("net", Compiled(network, 0.2), network, SPEC).passed


def test_pixels_count_when_more_than_one_level_off() -> None:
    network = Exportable(Levels(), [{"x": torch.full((3, 4), 100.0)}], "y")
    one_level = check_parity("net", Compiled(network, 1), network, SPEC)
    assert (one_level.within_one_level, one_level.passed) == (1.0, True)
    error = torch.tensor([2, 0, 0, 0])
    row = check_parity("net", Compiled(network, error), network, SPEC)
    assert (row.within_one_level, row.error, row.passed) == (0.75, 0.25, False)
    assert check_parity(
        "net", Compiled(network, error), network, dataclasses.replace(SPEC, tolerance=0.25)
    ).passed


def test_nan_fails() -> None:
    network = Exportable(Half(), [{"x": torch.ones(2, 2)}], "y")
    assert not check_parity("net", Compiled(network, float("nan")), network, SPEC).passed
