"""A network on its way to a compiler: the module, and the real inputs that it is traced on and compared on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.export.spec import BatchRange
from ubgen.runtime import Dim, Signature, TensorSpec

Say = Callable[[str], None]
"""Shows the user what is being done."""


@dataclass(frozen=True)
class Exportable:
    """A network with the real inputs that it is traced on and compared on (each with at least 2 rows).

    `constant` names the inputs that all rows share: their first dimension is 1, whatever the batch.
    """

    module: nn.Module
    inputs: Sequence[Mapping[str, Tensor]]
    output: str
    constant: frozenset[str] = frozenset()

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.module(**inputs)

    def example(self, batch: BatchRange) -> dict[str, Tensor]:
        """Rows to trace on: two where the batch is free, since a single one would become a constant of the graph."""
        return self.rows(self.inputs[0], 0, min(2, batch.max))

    def rows(self, inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) of `inputs`; the shared inputs whole."""
        return {name: t if name in self.constant else t[start:stop] for name, t in inputs.items()}

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        return next(len(tensor) for name, tensor in inputs.items() if name not in self.constant)

    def dynamic_shapes(self, batch: BatchRange) -> dict[str, dict[int, Any]] | None:
        """For `torch.export` and `torch.onnx.export`; None when the range is the single size 1."""
        if batch.max == 1:
            return None
        rows = torch.export.Dim("batch", min=batch.min, max=batch.max)
        return {name: {} if name in self.constant else {0: rows} for name in self.inputs[0]}

    def program(self, batch: BatchRange, rows: int | None = None) -> torch.export.ExportedProgram:
        """The network as one graph, its batch free in the range, traced on `rows` (at least those of `example`)."""
        example = self.example(batch)
        if rows is not None and rows > self.count(example):
            example = self.repeated(rows)
        with torch.no_grad():
            return torch.export.export(self.module, (), example, dynamic_shapes=self.dynamic_shapes(batch))

    def repeated(self, rows: int) -> dict[str, Tensor]:
        """So many rows of the first real input, beginning again where it has fewer."""
        index = torch.arange(rows) % self.count(self.inputs[0])
        return {n: t if n in self.constant else t[index.to(t.device)] for n, t in self.inputs[0].items()}

    def input_specs(self, batch: BatchRange) -> tuple[TensorSpec, ...]:
        """As a real input shows them, with the batch free in its range."""
        rows = _rows(batch)
        return tuple(_spec(n, t, 1 if n in self.constant else rows) for n, t in self.inputs[0].items())

    def signature(self, batch: BatchRange, output: Tensor | None = None) -> Signature:
        """`input_specs`, and the output as it is computed from a real input if it is not given."""
        result = self.reference(self.example(batch)) if output is None else output
        return Signature(self.input_specs(batch), (_spec(self.output, result, _rows(batch)),))


def _rows(batch: BatchRange) -> Dim:
    return Dim("batch", batch.min, batch.best, batch.max)


def _spec(name: str, tensor: Tensor, rows: Dim | int) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, (rows, *tensor.shape[1:]))
