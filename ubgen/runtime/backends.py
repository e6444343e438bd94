"""The compilers that an engine may come from. A new one adds one entry and one module."""

import platform
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.core.probes import Probe
from ubgen.runtime.network import Network, Signature

Load = Callable[[str, Path, Signature, str, int, Mapping[str, Any]], Network]


class Backend(NamedTuple):
    """One compiler, as the runtime sees it.

    `load(name, path, signature, device, threads, options)` opens a compiled file; `options` are the spec's.
    `probe(device)` says whether this machine can compile for that device and run the result, or why not.
    `version()` is what its files are tied to; it raises PackageNotFoundError where the compiler is not installed.
    """

    load: Load
    probe: Callable[[str], Probe]
    version: Callable[[], str]


def _lazily(module: str, network: str) -> Load:
    """Opens networks with a class of `ubgen.runtime.<module>`, which imports its compiler's library."""

    def load(
        name: str, path: Path, signature: Signature, device: str, threads: int, options: Mapping[str, Any]
    ) -> Network:
        opener = getattr(import_module(f"ubgen.runtime.{module}"), network)
        return opener(name, path, signature, device, threads, options)

    return load


def _probe(cpu: Callable[[], Probe] | None, cuda: Callable[[], Probe]) -> Callable[[str], Probe]:
    def probe(device: str) -> Probe:
        if parse_device(device).type != "cpu":
            return cuda()
        return cpu() if cpu else Probe(cuda().name, False, "has no engines for the CPU")

    return probe


def _onnxruntime_version() -> str:
    if not probes.onnxruntime_cpu().available:
        raise metadata.PackageNotFoundError("onnxruntime")
    return str(import_module("onnxruntime").__version__)  # there are two packages of this module


def _tensorrt_version() -> str:
    """Of TensorRT itself: a plan is tied to it, whatever wrote the plan."""
    try:
        return str(import_module("tensorrt").__version__)
    except ImportError as error:
        raise metadata.PackageNotFoundError("tensorrt") from error


_TENSORRT = _lazily("tensorrt", "TensorRtNetwork")

BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(
        _lazily("onnxruntime", "open_network"),
        _probe(probes.onnxruntime_cpu, probes.onnxruntime_cuda),
        _onnxruntime_version,
    ),
    "aotinductor": Backend(
        _lazily("aotinductor", "AotInductorNetwork"),
        _probe(probes.aotinductor_cpu, probes.aotinductor_cuda),
        lambda: torch.__version__,
    ),
    "tensorrt": Backend(_TENSORRT, _probe(None, probes.tensorrt), _tensorrt_version),
    "torch_tensorrt": Backend(_TENSORRT, _probe(None, probes.torch_tensorrt), _tensorrt_version),
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


def parse_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:1", whether it is there or not; UserError for any other."""
    try:
        device = torch.device(name)
    except RuntimeError:  # torch names its twenty device types, nearly all of them for other machines
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(
            f"device {name!r} is not known here; use cpu, cuda, or cuda:N for one of several GPUs"
        )
    return device


def device_architecture(device: str = "cpu") -> str:
    """What a compiled network is tied to: "cpu-x86_64", or "cuda-sm_90"."""
    parsed = parse_device(device)
    if parsed.type == "cpu":
        return f"cpu-{platform.machine()}"
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not available on this machine; use cpu")
    if (parsed.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device {device!r} is not there; the last of this machine is cuda:{count - 1}")
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm_{major}{minor}"
