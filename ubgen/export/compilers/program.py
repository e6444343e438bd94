"""What the compilers of PyTorch programs share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ubgen.core.errors import UserError
from ubgen.export.networks import Exportable
from ubgen.export.spec import NetworkSpec


def export_program(network: Exportable, spec: NetworkSpec) -> torch.export.ExportedProgram:
    """The network as one graph, its batch free in the spec's range."""
    with torch.no_grad():
        return torch.export.export(
            network.module,
            (),
            network.example(spec.batch),
            dynamic_shapes=network.dynamic_shapes(spec.batch),
        )


@contextmanager
def one_line(name: str, compiler: str) -> Iterator[None]:
    """What goes wrong inside a compiler, of any kind and often pages long, as a UserError; the cause stays attached.

    The line is that of the error which the others were raised from: it names the operator, they show the graph.
    """
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        lines = str(first).strip().splitlines() or [""]
        raise UserError(
            f"{name}: {compiler} could not compile it: {type(first).__name__}: {lines[0]}"
        ) from error
