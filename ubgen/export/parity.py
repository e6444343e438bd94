"""The gate at the end of an export: every engine against PyTorch in float32 on real inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ubgen.export.exportable import Exportable
from ubgen.export.spec import NetworkSpec
from ubgen.runtime import Network, run_rows


@dataclass(frozen=True)
class ParityRow:
    """How far one network is from PyTorch, the worst over all its inputs.

    `error` is what the tolerance bounds: `max_rel` for floats, for pixels the share beyond one grey level.
    `kept_float32`: modules left in float32, and `error_without` what the error was before the gate added to them.
    """

    network: str
    compiler: str
    precision: str
    rows: int
    max_abs: float
    max_rel: float
    within_one_level: float | None
    error: float
    tolerance: float
    kept_float32: tuple[str, ...] = ()
    error_without: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept_float32": list(self.kept_float32), "passed": self.passed}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ParityRow":
        known = {key: value for key, value in values.items() if key != "passed"}
        return ParityRow(**{**known, "kept_float32": tuple(values["kept_float32"])})


def check_parity(
    name: str, engine: Network, network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec
) -> ParityRow:
    """Run the engine on every real input, as batches of several rows and the first row alone.

    `expected` holds PyTorch's output for each of `network.inputs`.
    """
    parts = []
    for inputs, wanted in zip(network.inputs, expected, strict=True):
        parts.append((run_rows(engine, inputs)[network.output].cpu(), wanted))
        if spec.batch.min == 1:
            first = network.rows(inputs, 0, 1)
            parts.append((run_rows(engine, first)[network.output].cpu(), wanted[:1]))
    ours, reference = (torch.cat(side) for side in zip(*parts, strict=True))
    difference = (ours.double() - reference.double()).abs()
    max_abs = float(difference.max())
    max_rel = max_abs / _largest(reference)
    within = float((difference <= 1).double().mean()) if reference.dtype == torch.uint8 else None
    error = max_rel if within is None else 1 - within
    return ParityRow(
        name, spec.compiler, spec.precision, len(reference), max_abs, max_rel, within, error, spec.tolerance
    )


def row_errors(ours: Tensor, reference: Tensor, largest: float | None = None) -> Tensor:
    """(N,) what the tolerance bounds, for each row; NaN counts as infinite.

    `largest` is the largest |value| of all of PyTorch's output, when `reference` is only a part of it.
    """
    difference = (ours.double() - reference.double()).abs().reshape(len(ours), -1)
    if reference.dtype == torch.uint8:
        return (difference > 1).double().mean(dim=1)
    return difference.nan_to_num(nan=torch.inf).amax(dim=1) / (largest or _largest(reference))


def _largest(reference: Tensor) -> float:
    return max(float(reference.double().abs().max()), 1e-12)
