"""One network through the gate: compiled, compared with PyTorch, and mended where low precision broke it."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ubgen.core.config import to_dict
from ubgen.core.errors import UserError
from ubgen.export.compilers import COMPILERS, FROM_ONNX, Say
from ubgen.export.mend import offending_layers
from ubgen.export.networks import Exportable
from ubgen.export.parity import ParityRow, check_parity
from ubgen.export.precision import lower, record_calls
from ubgen.export.spec import NetworkSpec
from ubgen.runtime import Network, Signature
from ubgen.runtime.backends import backend


@dataclass(frozen=True)
class Candidate:
    """A network (float32, on the CPU) on its way through the gate; `expected` is its output for each real input."""

    name: str
    network: Exportable
    expected: Sequence[Tensor]
    spec: NetworkSpec
    device: str

    @property
    def signature(self) -> Signature:
        return self.network.signature(self.spec.batch, self.expected[0])

    def check(self, file: Path) -> ParityRow:
        """How far the compiled `file` is from PyTorch."""
        engine = open_network(self.name, file, self.signature, self.spec, self.device)
        return check_parity(self.name, engine, self.network, self.expected, self.spec)


def open_network(name: str, file: Path, signature: Signature, spec: NetworkSpec, device: str) -> Network:
    load = backend(spec.compiler).load
    return load(name, file, signature, device, torch.get_num_threads(), to_dict(spec.options))


def pass_gate(
    candidate: Candidate, directory: Path, say: Say, base: Path | None = None
) -> tuple[ParityRow, list[Path]]:
    """Compile into `directory` until PyTorch is met within the tolerance; the report's row, and the files.

    In low precision a second attempt leaves those layers in float32 that cause the error. `base`: see `Compile`.
    UserError when the network still misses its tolerance.
    """
    name, spec = candidate.name, candidate.spec
    row, files = _attempt(candidate, spec.keep_float32, directory, say, base)
    if not row.passed and spec.precision != "float32":
        say(f"{name}: error {row.error:.1e} in {spec.precision}; looking for the layers that cause it")
        more = offending_layers(candidate.network, candidate.expected, spec, candidate.device, say)
        if more:
            without = row.error
            row, files = _attempt(candidate, (*spec.keep_float32, *more), directory, say)
            row = replace(row, error_without=without)
    if not row.passed:
        raise UserError(_missed(row))
    return row, files


def _attempt(
    candidate: Candidate, keep: tuple[str, ...], directory: Path, say: Say, base: Path | None = None
) -> tuple[ParityRow, list[Path]]:
    name, network, device = candidate.name, candidate.network, candidate.device
    spec = replace(candidate.spec, keep_float32=keep)
    say(f"{name}: compiling with {spec.compiler} in {spec.precision}")
    calls = record_calls(network.module, network.example(spec.batch)) if keep else None
    traced_on = "cpu" if spec.compiler in FROM_ONNX else device
    lowered = lower(network.module, spec.precision, keep, calls, traced_on)
    inputs = [{n: t.to(traced_on) for n, t in given.items()} for given in network.inputs]
    exportable = replace(network, module=lowered, inputs=inputs)
    files = COMPILERS[spec.compiler](exportable, spec, directory / name, device, say, base).files
    del lowered, inputs, exportable
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    say(f"{name}: comparing with PyTorch")
    return replace(candidate.check(files[0]), kept_float32=keep), files


def _missed(row: ParityRow) -> str:
    kept = f" even with {', '.join(row.kept_float32)} in float32" if row.kept_float32 else ""
    return (
        f"{row.network}: the engine differs from PyTorch by {row.error:.2e}{kept}, more than the spec's tolerance "
        f"{row.tolerance:.2e}"
    )
