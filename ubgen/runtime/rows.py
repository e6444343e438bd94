"""Any number of rows through a network that takes a limited number in one call."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ubgen.runtime.network import Dim, Network


def run_rows(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`network.run` on any number of rows (at least 1), on the network's device.

    Rows are cut into calls of at most the network's largest batch; a call of fewer than its smallest is filled up
    with copies of the last row, which are dropped again. Inputs that all rows share go into every call whole.
    """
    parts = [
        {name: tensor[:rows] for name, tensor in network.run(chunk).items()}
        for chunk, rows in _chunks(network, inputs)
    ]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunks(network: Network, inputs: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
    batch = network.signature.batch
    by_row = {spec.name for spec in network.signature.inputs if isinstance(spec.shape[0], Dim)}
    placed = {name: tensor.to(network.device) for name, tensor in inputs.items()}
    total = len(next(tensor for name, tensor in placed.items() if name in by_row))
    for start in range(0, total, batch.max):
        rows = min(batch.max, total - start)
        yield (
            {n: _filled(t[start : start + rows], batch.min) if n in by_row else t for n, t in placed.items()},
            rows,
        )


def _filled(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].repeat_interleave(missing, dim=0)])
