"""The compilers that an engine may come from: all that differs between them but the two modules that each names."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.core.probes import Probe
from ubgen.runtime.network import Network, Signature

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Backend:
    """One compiler. `precisions` and `probes` are by type of device, "cpu" or "cuda"."""

    name: str
    suffix: str
    """Of the file that the runtime opens."""
    network: str
    """Class in `ubgen.runtime` that opens it, as "module.Class"."""
    compiler: str
    """Module in `ubgen.export.compilers` with a function `compile_network` that makes it."""
    precisions: Mapping[str, tuple[str, ...]]
    probes: Mapping[str, Callable[[], Probe]]
    installed_version: Callable[[], str]
    """What its files are tied to; raises PackageNotFoundError."""
    options: frozenset[str] = frozenset()
    """The options of a spec that it alone, or with others, understands."""
    from_onnx: bool = False
    """Whether it reads an ONNX file. That is written on the CPU: the GPU's memory is the compiler's."""
    needs: Mapping[str, Callable[[], Probe]] = field(default_factory=dict)
    """What a precision needs besides."""
    opset_23: Mapping[str, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    """By device, the package and its first release that runs ONNX of opset 23, if not every one does."""

    def probe(self, device: str) -> Probe:
        """Whether this machine can compile for the device and run the result, or why not."""
        kind = parse_device(device).type
        if kind not in self.probes:
            return Probe(self.name, False, f"has no engines for {'the CPU' if kind == 'cpu' else kind}")
        return self.probes[kind]()

    def missing(self, device: str, precision: str, opset: int) -> str | None:
        """Why this machine cannot compile such a network, in a line; None when it can."""
        probe = self.probe(device)
        if opset >= 23 and (release := self.opset_23.get(parse_device(device).type)):
            probe = probes.at_least(probe, *release, advice=", or set opset = 20")
        needed = [probe, *(self.needs[precision]() for _ in range(precision in self.needs))]
        return next((f"{answer.name}: {answer.detail}" for answer in needed if not answer.available), None)

    def version(self) -> str:
        """UserError when the compiler is not installed."""
        try:
            return self.installed_version()
        except metadata.PackageNotFoundError:
            raise UserError(f"compiler {self.name!r} is not installed on this machine") from None

    def load(
        self,
        name: str,
        path: Path,
        signature: Signature,
        device: str,
        threads: int,
        options: Mapping[str, Any],
    ) -> Network:
        """Open a compiled file; `options` are the spec's."""
        module, _, opener = self.network.partition(".")
        return getattr(import_module(f"ubgen.runtime.{module}"), opener)(
            name, path, signature, device, threads, options
        )


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


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="onnxruntime",
            suffix=".onnx",
            network="onnxruntime.open_network",
            compiler="onnx",
            precisions={"cpu": ("float32", "float16"), "cuda": ("float32", *HALF)},
            probes={"cpu": probes.onnxruntime_cpu, "cuda": probes.onnxruntime_cuda},
            installed_version=_onnxruntime_version,
            options=frozenset({"provider", "cuda_graphs"}),
            from_onnx=True,
            opset_23={"cuda": ("onnxruntime-gpu", (1, 25))},  # before, Attention runs on the CPU
        ),
        Backend(
            name="aotinductor",
            suffix=".pt2",
            network="aotinductor.AotInductorNetwork",
            compiler="aotinductor",
            precisions={"cpu": ("float32", *HALF), "cuda": ("float32", *HALF)},
            probes={"cpu": probes.aotinductor_cpu, "cuda": probes.aotinductor_cuda},
            installed_version=lambda: torch.__version__,
            options=frozenset({"cuda_graphs", "freeze", "max_autotune"}),
        ),
        Backend(
            name="tensorrt",
            suffix=".plan",
            network="tensorrt.TensorRtNetwork",
            compiler="tensorrt",
            precisions={"cuda": ("float32", *HALF, "float8")},
            probes={"cuda": probes.tensorrt},
            installed_version=_tensorrt_version,
            options=frozenset({"cuda_graphs", "refit", "workspace_gb", "optimization_level"}),
            from_onnx=True,
            needs={"float8": probes.modelopt},
            opset_23={"cuda": ("tensorrt", (10, 15))},
        ),
        Backend(
            name="torch_tensorrt",
            suffix=".plan",
            network="tensorrt.TensorRtNetwork",
            compiler="torch_tensorrt",
            precisions={"cuda": ("float32", *HALF)},
            probes={"cuda": probes.torch_tensorrt},
            installed_version=_tensorrt_version,
            options=frozenset({"cuda_graphs", "workspace_gb", "optimization_level"}),
        ),
    )
}


def backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise UserError(f"unknown compiler {name!r}; use one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def parse_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:1", whether it is there or not; UserError for any other."""
    try:
        device = torch.device(name)
    except RuntimeError:  # torch names its twenty device types, nearly all of them for other machines
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; use cpu, cuda, or cuda:N for one of several GPUs")
    return device


def device_architecture(device: str = "cpu") -> str:
    """What a compiled network is tied to: "cpu-x86_64", or "cuda-sm_90"."""
    parsed = parse_device(device)
    if parsed.type == "cpu":
        return f"cpu-{platform.machine()}"
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not available on this machine; use cpu")
    if (parsed.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device {device!r} does not exist; the last GPU of this machine is cuda:{count - 1}")
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm_{major}{minor}"
