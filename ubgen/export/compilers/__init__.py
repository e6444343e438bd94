"""The compilers, one module each: a network in its precision -> the files that the runtime opens."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ubgen.core.errors import UserError
from ubgen.export.networks import Exportable
from ubgen.export.spec import NetworkSpec
from ubgen.runtime.backends import backend

Say = Callable[[str], None]


class Compiled(NamedTuple):
    """`files`: the first is the one that the runtime opens."""

    files: list[Path]


Compile = Callable[..., Compiled]
"""(network in its precision, spec, directory/name without suffix, device, say, base=None) -> files.

The network lies on the device, or for the compilers in `FROM_ONNX` on the CPU. `base` is a file compiled from the same
graph with other weights, for a compiler that can start from it (option refit).
UserError when it can't be compiled. What is made on the way is removed.
"""


def _lazily(module: str) -> Compile:
    """`compile_network` of the module, which imports its compiler: each takes a second or is not everywhere."""

    def compile_network(
        network: Exportable,
        spec: NetworkSpec,
        path: Path,
        device: str,
        say: Say,
        base: Path | None = None,
    ) -> Compiled:
        if not (probe := backend(module).probe(device)).available:
            raise UserError(f"{probe.name}: {probe.detail}")
        start = {"base": base} if base is not None and spec.options.refit else {}
        compiler = import_module(f"{__name__}.{module}")
        return compiler.compile_network(network, spec, path, device, say, **start)

    return compile_network


FROM_ONNX = frozenset({"onnxruntime", "tensorrt"})
"""Compilers that are given an ONNX file. It is written on the CPU: the GPU's memory is theirs."""

COMPILERS: dict[str, Compile] = {
    name: _lazily(name) for name in ("onnxruntime", "aotinductor", "tensorrt", "torch_tensorrt")
}
