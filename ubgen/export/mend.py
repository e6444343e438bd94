"""Which layers of a network can't bear low precision: found by halving, with PyTorch in that precision."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ubgen.export.inputs import outputs
from ubgen.export.networks import Exportable
from ubgen.export.parity import row_errors
from ubgen.export.precision import Calls, lower, record_calls
from ubgen.export.spec import NetworkSpec

_MARGIN = 0.5  # of the tolerance: the engine rounds elsewhere than PyTorch does
_WORST_ROWS = 4  # of all real inputs; what mends these is then tried on all of them by the gate
_DEPTH = 4  # how often blocks are opened: in a UNet network, block, sub-block, layer

Say = Callable[[str], None]


def offending_layers(
    network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec, device: str, say: Say
) -> tuple[str, ...]:
    """Modules to keep in float32 so that `network` (float32, on the CPU) meets its tolerance; empty if none helps.

    Delta debugging over the blocks that the network calls: starting from all of them, halves, quarters and at last
    single blocks are left out while the rest still suffices. Then each that remains is opened, and the same is done
    with the blocks inside.
    """
    search = _Search.of(network, expected, spec, device)
    kept = _blocks(search.calls, "")
    # when low precision alone is good enough it is not what went wrong; when float32 everywhere is not, neither
    if search.passes(()) or not search.passes(kept):
        return ()
    kept = smallest(kept, search.passes)
    for _ in range(_DEPTH):
        say(f"layers that need float32: looking into {', '.join(kept)}")
        finer = _open(kept, search)
        if finer == kept:
            break
        kept = finer
    return tuple(kept)


def smallest(blocks: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> list[str]:
    """A part of `blocks` that still passes, and from which no single one can be left out; `blocks` itself passes."""
    kept, size = list(blocks), max(1, len(blocks) // 2)
    while size:
        start, shrunk = 0, False
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if fewer and passes(fewer):
                kept, shrunk = fewer, True
            else:
                start += size
        size = size if shrunk and size == 1 else size // 2
    return kept


def _open(kept: Sequence[str], search: "_Search") -> list[str]:
    """Each block replaced by those of its own blocks that are needed, where they suffice."""
    current = list(kept)
    for block in kept:
        inner = _blocks(search.calls, block)
        others = [other for other in current if other != block]
        if inner and search.passes([*others, *inner]):
            needed = smallest(inner, lambda part, others=others: search.passes([*others, *part]))  # type: ignore[misc]
            current = search.in_order([*others, *needed])
    return current


def _blocks(calls: Calls, path: str) -> list[str]:
    """The called modules right below `path`, in order; containers that are not called themselves don't count."""
    inside = [
        name for name in calls.names if name and name != path and (not path or name.startswith(f"{path}."))
    ]
    return [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]


@dataclass(frozen=True)
class _Search:
    network: Exportable
    expected: Tensor
    largest: float
    spec: NetworkSpec
    calls: Calls
    device: str

    @staticmethod
    def of(network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec, device: str) -> "_Search":
        """On the worst rows of all real inputs."""
        calls = record_calls(network.module, network.example(spec.batch))
        largest = max(float(wanted.double().abs().max()) for wanted in expected)
        whole = _Search(network, torch.empty(0), largest, spec, calls, device)
        ours = whole.lowered_outputs(())
        errors = [row_errors(o, e, largest) for o, e in zip(ours, expected, strict=True)]
        ranked = sorted(
            ((float(error), i, row) for i, rows in enumerate(errors) for row, error in enumerate(rows)),
            reverse=True,
        )[:_WORST_ROWS]
        inputs = [network.rows(network.inputs[i], row, row + 1) for _, i, row in ranked]
        wanted = torch.cat([expected[i][row : row + 1] for _, i, row in ranked])
        return replace(whole, network=replace(network, inputs=inputs), expected=wanted)

    def lowered_outputs(self, kept: Sequence[str]) -> list[Tensor]:
        names = self.in_order([*self.spec.keep_float32, *kept])
        module = lower(
            self.network.module,
            self.spec.precision,
            names,
            self.calls,
            self.device,
            emulate_float8=True,
        )
        return outputs(replace(self.network, module=module), self.device)

    def passes(self, kept: Sequence[str]) -> bool:
        try:
            ours = torch.cat(self.lowered_outputs(kept))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # float32 and low precision meet in an operation that takes no two types
            return False
        errors = row_errors(ours, self.expected, self.largest)
        return bool(errors.max() <= self.spec.tolerance * _MARGIN)

    def in_order(self, names: Sequence[str]) -> list[str]:
        place = {name: i for i, name in enumerate(self.calls.names)}
        return sorted(dict.fromkeys(names), key=lambda name: place.get(name, -1))
