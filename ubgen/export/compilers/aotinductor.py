"""AOTInductor: C++ or Triton kernels of one network, compiled into a `.pt2` package."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from ubgen.core.errors import UserError
from ubgen.export.compilers import one_line
from ubgen.export.exportable import Exportable, Say
from ubgen.export.spec import NetworkSpec
from ubgen.runtime.aotinductor import CPU_FEATURES, SIGNATURE, cpu_features
from ubgen.runtime.network import exact_float32

_PLAIN = re.compile(r"[\w./+@%:,=-]+", re.ASCII)


def compile_network(network: Exportable, spec: NetworkSpec, file: Path, device: str, say: Say) -> list[Path]:
    """Write the package `file`: for this processor and its instruction sets, or for this kind of GPU."""
    metadata = {
        SIGNATURE: json.dumps(network.signature(spec.batch).to_dict()),
        CPU_FEATURES: cpu_features(),
    }
    with (
        tempfile.TemporaryDirectory(prefix=f"{file.stem}-", dir=plain_directory(file.parent)) as scratch,
        one_line(file.stem, "AOTInductor"),
        exact_float32(),  # what Triton multiplies is settled here
        _temporary_files_in(scratch),
        fresh_cache(dir=scratch),  # Inductor's own would keep a copy of the weights for good
    ):
        written = Path(scratch, file.name)
        torch._inductor.aoti_compile_and_package(
            # kernels are timed, and laid out, for as many rows as the trace has
            network.program(spec.batch, None if device == "cpu" else spec.batch.best),
            package_path=str(written),
            inductor_configs={**settings(spec, device), "aot_inductor.metadata": metadata},
        )
        shutil.move(written, file)
    return [file]


def plain_directory(*wanted: Path) -> Path:
    """The first of `wanted`, or of the system's own, in which the C++ compiler can work.

    Inductor writes paths into the compiler's command line without quotes, so that a space or an apostrophe ends them.
    UserError when no directory will do.
    """
    for place in (*wanted, Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):
        if _PLAIN.fullmatch(str(place.resolve())) and os.access(place, os.W_OK):
            return place
    raise UserError(
        f"{wanted[0]}: AOTInductor needs a path without spaces and quotes; set TMPDIR to such a directory"
    )


@contextmanager
def _temporary_files_in(directory: str) -> Iterator[None]:
    """The C++ compiler's own temporary files go where the package goes, and not into a TMPDIR that may be full."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = directory
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def settings(spec: NetworkSpec, device: str) -> dict[str, Any]:
    """Inductor's configuration for one network."""
    chosen = {
        # or the package would always use as many threads as the machine that compiled it
        "cpp.dynamic_threads": True,
        # or a call of a single row would be refused where AOTI_RUNTIME_CHECK_INPUTS is set
        "aot_inductor.check_lowerbound": False,
        "freezing": spec.options.freeze,
        "max_autotune": spec.options.max_autotune,
    }
    if device != "cpu":
        # channels-last convolutions: by itself Inductor has them where the batch is a number alone
        chosen["force_layout_optimization"] = True
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in chosen.items() if name in known}  # torch 2.11 lacks some
