"""The compilers, one module each: a network in its precision -> the files that the runtime opens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from ubgen.core.errors import UserError, first_line
from ubgen.export.exportable import Exportable, Say
from ubgen.export.spec import NetworkSpec
from ubgen.runtime.backends import backend

_CPP_ERROR = re.compile(r"^.*(\berror: |No space left on device).*$", re.MULTILINE)


def compile_network(
    network: Exportable,
    spec: NetworkSpec,
    path: Path,
    device: str,
    say: Say,
    base: Path | None = None,
) -> list[Path]:
    """Compile `network`, in its precision, with the compiler of `spec`, to `path` and the compiler's suffix.

    Returns the files, the one to open first. The network lies on the device, or for a compiler that reads ONNX on the
    CPU. `base` is a file compiled from the same graph with other weights, which a compiler with the option refit
    starts from.
    UserError when it cannot be compiled. What is made on the way is removed.
    """
    compiler = backend(spec.compiler)
    if not (probe := compiler.probe(device)).available:
        raise UserError(f"{probe.name}: {probe.detail}")
    start = {"base": base} if base is not None and spec.options.refit else {}
    module = import_module(
        f"{__name__}.{compiler.compiler}"
    )  # each takes a second, or is not installed everywhere
    return module.compile_network(
        network, spec, path.with_name(path.name + compiler.suffix), device, say, **start
    )


@contextmanager
def one_line(name: str, compiler: str) -> Iterator[None]:
    """What goes wrong inside a compiler, of any kind and often pages long, as a UserError; the cause stays attached.

    The line is from the innermost cause: it names the operator, while later errors show the graph. Of a C++ compiler's
    output the first error is shown.
    """
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        found = _CPP_ERROR.search(str(first))
        reason = f"{type(first).__name__}: {found[0].strip() if found else first_line(first)}"
        raise UserError(f"{name}: {compiler} could not compile it: {reason}") from error
