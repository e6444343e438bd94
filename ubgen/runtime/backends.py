"""The compilers that an engine may come from. A new one adds one entry and one module."""

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from ubgen.errors import UserError
from ubgen.runtime.network import Network, Signature


class Backend(NamedTuple):
    """`load(name, path, signature, device, threads)` opens one compiled file; `version()` is the compiler's."""

    load: Callable[[str, Path, Signature, str, int], Network]
    version: Callable[[], str]


def _load_onnxruntime(name: str, path: Path, signature: Signature, device: str, threads: int) -> Network:
    from ubgen.runtime.onnxruntime import OnnxRuntimeNetwork  # the import alone costs a fifth of a second

    return OnnxRuntimeNetwork(name, path, signature, device, threads)


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(_load_onnxruntime, lambda: metadata.version("onnxruntime")),
}


def backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise UserError(f"compiler {name!r} is not known here; there is {', '.join(BACKENDS)}")
    return BACKENDS[name]


def compiler_version(name: str) -> str:
    """The installed version of the compiler `name`; UserError when it is not installed."""
    try:
        return backend(name).version()
    except metadata.PackageNotFoundError:
        raise UserError(f"compiler {name!r} is not installed on this machine") from None


def device_architecture(device: str = "cpu") -> str:
    """What a compiled network is tied to: "cpu-x86_64", or "cuda-sm_90"."""
    if torch.device(device).type == "cpu":
        return f"cpu-{platform.machine()}"
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not available on this machine; use cpu")
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm_{major}{minor}"
