"""AOTInductor packages (`.pt2`), on the CPU or a GPU."""

import ctypes
import json
import platform
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.errors import UserError, first_line
from ubgen.runtime.cuda_graphs import GraphedCalls, Inputs, Replay, Sizes, TorchGraph
from ubgen.runtime.network import Network, Signature

SIGNATURE = "ubgen.signature"
CPU_FEATURES = "ubgen.cpu_features"
"""Keys of what the compiler module records in a package."""

_MADV_PAGEOUT = 21  # linux/mman.h; reads the file again if it must, so it can lose nothing
_X86_INSTRUCTIONS = re.compile(r"(s?sse|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|v?aes|sha|gfni|v?pclmul)")


class AotInductorNetwork(Network):
    """A package takes whatever it is given and reads it as it expects it: the signature's checks come first."""

    def __init__(
        self,
        name: str,
        path: Path,
        signature: Signature,
        device: str,
        threads: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(name, signature, device)
        _check_package(path, signature, device)
        graphs = bool(options.get("cuda_graphs"))
        try:
            # one runner: the others would wait on events, which a graph cannot hold
            self._model = torch._inductor.aoti_load_package(
                str(path), run_single_threaded=graphs, device_index=_index(device)
            )
        except Exception as error:  # of many kinds, from C++
            where = tempfile.gettempdir()
            raise UserError(
                f"{path} cannot be opened by AOTInductor, which unpacks it in {where}: {first_line(error)}"
            ) from error
        _forget_file_pages()
        self._threads = threads
        self._output = signature.outputs[0].name
        self._graphed = GraphedCalls(self._call, self._capture) if graphs else None

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        with _threads(self._threads):
            return self._graphed(inputs, sizes) if self._graphed else self._call(inputs)

    @torch.no_grad()
    def _call(self, inputs: Inputs, sizes: Sizes | None = None) -> dict[str, Tensor]:
        return {self._output: self._model(**inputs)}

    def _capture(self, inputs: Inputs, sizes: Sizes) -> Replay:
        return TorchGraph(self._call, inputs)


def cpu_features() -> str:
    """The instruction sets of this processor that a compiler may use, separated by spaces; empty if unknown.

    The generated code is compiled with -march=native, so it runs only where all of them are.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    names = sorted(found[1].split()) if found else []
    if platform.machine() in ("x86_64", "AMD64"):
        names = [name for name in names if _X86_INSTRUCTIONS.match(name)]
    return " ".join(names)


def _check_package(path: Path, signature: Signature, device: str) -> None:
    """Before the code in it is loaded: that it is a package of this network, and for this processor."""
    metadata = _metadata(path)
    if metadata.get(SIGNATURE) != json.dumps(signature.to_dict()):
        raise UserError(f"{path} was not compiled for these inputs and outputs; run ubgen-export again")
    if torch.device(device).type != "cpu":
        return
    here = cpu_features().split()
    if here and (lacking := [name for name in metadata[CPU_FEATURES].split() if name not in here]):
        raise UserError(
            f"{path} was compiled for a CPU with {lacking[0]}, which this one lacks; "
            "run ubgen-export again on this machine"
        )


def _forget_file_pages() -> None:
    """Take the packages' files out of this process's memory, where the loader leaves a second copy of all weights.

    It maps the file and copies the weights out of it; the mapping stays and is not read again. The system may drop its
    pages at any time; asked for here, it does so now. Where it cannot (before Linux 5.4, /tmp in memory), nothing is
    lost but the saving.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in maps:
        if "/data/aotinductor/" in line:  # where the loader unpacks them, below a directory of its own
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            advise(start, end - start, _MADV_PAGEOUT)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as package:
            entries = [n for n in package.namelist() if n.endswith("_metadata.json")]
            return json.loads(package.read(entries[0]))
    except (zipfile.BadZipFile, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is no AOTInductor package, or is not whole; run ubgen-export again"
        ) from error


def _index(device: str) -> int:
    index = torch.device(device).index
    return -1 if index is None else index


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The generated loops and torch's own kernels both take torch's number of threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
