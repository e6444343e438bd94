"""What the compilers of PyTorch programs share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ubgen.errors import UserError
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
    """What goes wrong inside a compiler, of any kind and often pages long, as a UserError; the cause stays attached."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{name}: {compiler} could not compile it: {type(error).__name__}: {lines[0]}"
        ) from error
