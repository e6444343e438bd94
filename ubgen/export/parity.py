"""The gate at the end of an export: every engine against PyTorch on real inputs."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ubgen.export.networks import Exportable
from ubgen.export.spec import NetworkSpec
from ubgen.runtime import Network


@dataclass(frozen=True)
class ParityRow:
    """How far one network is from PyTorch, the worst over all its inputs.

    `error` is what the tolerance bounds: `max_rel` for floats, for pixels the share beyond one grey level.
    """

    network: str
    rows: int
    max_abs: float
    max_rel: float
    within_one_level: float | None
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check_parity(name: str, engine: Network, network: Exportable, spec: NetworkSpec) -> ParityRow:
    """Run both sides on every real input, as batches of several rows and the first row alone."""
    parts = []
    for inputs in network.inputs:
        reference = network.reference(inputs)
        parts.append((_run(engine, network, inputs, spec.batch.max), reference))
        if spec.batch.min == 1:
            first = {key: tensor[:1] for key, tensor in inputs.items()}
            parts.append((_run(engine, network, first, 1), reference[:1]))
    ours, wanted = (torch.cat(side) for side in zip(*parts, strict=True))
    return _compare(name, ours, wanted, spec.tolerance)


def _run(engine: Network, network: Exportable, inputs: Any, largest: int) -> Tensor:
    """In calls of at most `largest` rows."""
    chunks = zip(*(tensor.split(largest) for tensor in inputs.values()), strict=True)
    rows = [engine.run(dict(zip(inputs, chunk, strict=True)))[network.output] for chunk in chunks]
    return torch.cat(rows)


def _compare(name: str, ours: Tensor, reference: Tensor, tolerance: float) -> ParityRow:
    difference = (ours.double() - reference.double()).abs()
    max_abs = float(difference.max())
    max_rel = max_abs / max(float(reference.double().abs().max()), 1e-12)
    within = None
    if reference.dtype == torch.uint8:
        within = float((difference <= 1).double().mean())
    error = max_rel if within is None else 1 - within
    return ParityRow(name, len(reference), max_abs, max_rel, within, error, tolerance)
