"""What this machine can run, and why not: the one place that tries optional packages, devices and tools.

A probe imports lazily, never raises, and remembers its answer.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError, first_line, install_extra
from ubgen.core.stage import device_name

# without the constraints: ModelOpt asks for older releases of onnx and ONNX Runtime
_FLOAT8 = "not installed; in an environment of its own: pip install -e '.[tensorrt,float8]'"
# not the extra alone: both packages are one Python module, and the second would be written over the first
GET_ONNXRUNTIME_GPU = "pip uninstall onnxruntime, then pip install -c constraints.txt onnxruntime-gpu"


@dataclass(frozen=True)
class Probe:
    """One thing that may be there; `detail` is its version or place, or the reason why it is not available."""

    name: str
    available: bool
    detail: str


def all_probes() -> list[Probe]:
    """Everything that `ubgen-doctor` shows, in its order."""
    probes: list[Callable[[], Probe]] = [torch_cpu, torch_cuda, native_cpu, native_cuda]
    probes += [onnxruntime_cpu, onnxruntime_cuda, aotinductor_cpu, aotinductor_cuda]
    probes += [tensorrt, torch_tensorrt, modelopt, xformers, dali, ray, cxx_compiler, nvcc]
    return [probe() for probe in probes]


def torch_cpu() -> Probe:
    """PyTorch on the CPU: always there."""
    import torch

    cpu = device_name() if not torch.cuda.is_available() else "cpu"
    return Probe("torch: CPU", True, f"{torch.__version__}, {torch.get_num_threads()} threads, {cpu}")


def torch_cuda() -> Probe:
    """PyTorch on an NVIDIA GPU."""
    return Probe("torch: CUDA", not (reason := _no_cuda()), reason or _cuda_description())


def _no_cuda() -> str:
    """Why torch has no CUDA device; empty when it has one."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU, or its driver is missing or too old"


def _cuda_description() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def native_cpu() -> Probe:
    """Our fused operations for CPU tensors."""
    from ubgen.ops import native_status

    available, detail = native_status()
    return Probe("native library: CPU", available, detail if available else f"{detail}; PyTorch runs instead")


def native_cuda() -> Probe:
    """Our fused operations for CUDA tensors."""
    from ubgen.ops import cuda_status

    available, detail = cuda_status()
    if available and _no_cuda():
        return Probe("native library: CUDA", False, f"built, but {_no_cuda()}")
    return Probe(
        "native library: CUDA", available, detail if available else f"{detail}; PyTorch runs instead"
    )


def onnxruntime_cpu() -> Probe:
    """ONNX Runtime's CPU engines: the back end of the miniature."""
    return _provider("CPU", "CPUExecutionProvider")


def onnxruntime_cuda() -> Probe:
    """ONNX Runtime's CUDA engines."""
    return _provider("CUDA", "CUDAExecutionProvider")


@cache
def _provider(label: str, provider: str) -> Probe:
    name = f"onnxruntime: {label}"
    package = _package("onnxruntime", "onnxruntime", "")
    if not package.available:
        return Probe(name, False, package.detail)
    runtime = importlib.import_module("onnxruntime")
    if provider not in runtime.get_available_providers():
        return Probe(name, False, f"{package.detail} has no {provider}; {GET_ONNXRUNTIME_GPU}")
    if label != "CPU" and _no_cuda():
        return Probe(name, False, f"{package.detail}, but {_no_cuda()}")
    if label != "CPU" and not _starts(runtime, provider):
        return Probe(
            name, False, f"{package.detail}, but {provider} does not start; are its CUDA libraries there?"
        )
    return Probe(name, True, package.detail)


def _starts(runtime: Any, provider: str) -> bool:
    """A provider whose libraries are missing is only found out by a session, which then runs on the CPU."""
    from onnx import TensorProto, helper

    source, target = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [source], [target])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    return provider in session.get_providers()


def aotinductor_cpu() -> Probe:
    """AOTInductor for the CPU: it compiles with the C++ compiler; what it made runs without one."""
    return _aotinductor("CPU", "")


def aotinductor_cuda() -> Probe:
    """AOTInductor for an NVIDIA GPU."""
    triton = "" if _installed("triton") else "triton is not installed"
    return _aotinductor("CUDA", _no_cuda() or triton)


def _aotinductor(label: str, reason: str) -> Probe:
    import torch

    compiler = cxx_compiler()
    reason = reason or ("" if compiler.available else f"engines cannot be built: {compiler.detail}")
    version = f"torch {torch.__version__}"
    return Probe(f"aotinductor: {label}", not reason, f"{version}, but {reason}" if reason else version)


@cache
def tensorrt() -> Probe:
    """NVIDIA TensorRT, stand-alone; strongly typed networks are whole from 10.12 on."""
    return _on_cuda(at_least(_package("tensorrt", "tensorrt", "tensorrt"), "tensorrt", (10, 12)))


@cache
def torch_tensorrt() -> Probe:
    """Torch-TensorRT; from 2.14 on an engine's tensors can be named."""
    probe = _package("torch_tensorrt", "torch_tensorrt", "torch-tensorrt")
    return _on_cuda(at_least(probe, "torch-tensorrt", (2, 14)))


def modelopt() -> Probe:
    """NVIDIA Model Optimizer, for float8 engines. Looked up, not imported: that alone takes seconds."""
    if not _installed("modelopt"):
        return Probe("modelopt (float8)", False, _FLOAT8)
    return Probe("modelopt (float8)", True, metadata.version("nvidia-modelopt"))


def xformers() -> Probe:
    """xformers attention in the UNet, tried in both half precisions."""
    probe = _package("xformers", "xformers.ops", "xformers")
    if not probe.available:
        return probe
    if _no_cuda():
        return Probe("xformers", False, f"has no operator for CPU tensors, and {_no_cuda()}")
    reasons = [xformers_problem("cuda", dtype) for dtype in ("float16", "bfloat16")]
    return Probe("xformers", not any(reasons), next(filter(None, reasons), probe.detail))


@cache
def xformers_problem(device: str, dtype: str) -> str:
    """Why the UNet's attention cannot be left to xformers on `device` in `dtype`; empty where it can.

    Computes it: forward and backward at Stable Diffusion 1.x's head widths, 40, 80 and 160, for attention to the image
    and to a prompt of 77 tokens, against PyTorch's own.
    """
    probe = _package("xformers", "xformers.ops", "xformers")
    if not probe.available:
        return probe.detail
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    for width in (40, 80, 160):
        for tokens in (64, 77):
            try:
                problem = _attention_problem(attend, width, tokens, device, dtype)
            except Exception as error:  # of its many kernels each has errors of its own
                problem = f"{type(error).__name__}: {first_line(error)}"
            if problem:
                return f"{probe.detail} fails at head width {width} in {dtype} on {device}: {problem}"
    return ""


def _attention_problem(attend: Callable[..., Any], width: int, tokens: int, device: str, dtype: str) -> str:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 64, width), (2, tokens, width), (2, tokens, width)]
    given = [
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).requires_grad_()
        for shape in shapes
    ]
    query, key, value = given
    ours = attend(query, key, value, scale=width**-0.5)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    weights = torch.randn(wanted.shape, generator=generator).to(wanted)
    pairs = [(ours, wanted)]
    pairs += zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (ours, wanted)), strict=True)
    # bfloat16 has 8 bits: values near 4, the largest here, are 0.03 apart
    if all(torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.05) for a, b in pairs):
        return ""
    return "its results differ from PyTorch's"


def dali() -> Probe:
    """NVIDIA DALI; its CPU operators run without a GPU."""
    return _package("nvidia.dali", "nvidia.dali", "dali")


def require_dali() -> None:
    """UserError that says how to get DALI, where it does not work."""
    if not (probe := dali()).available:
        raise UserError(f"--loader dali: {probe.detail}; {install_extra('dali')}")


def spdl() -> Probe:
    """SPDL, a peer in `ubgen-bench pretrain`; it needs FFmpeg's shared libraries."""
    if not _installed("spdl.io"):
        return Probe("spdl", False, "not installed; pip install -c constraints.txt spdl")
    try:
        importlib.import_module("spdl.io").demux_config()
    except Exception as error:
        return Probe("spdl", False, f"installed, but it does not run: {first_line(error)[:100]}")
    return Probe("spdl", True, metadata.version("spdl"))


def ray() -> Probe:
    """Ray, for synthesis on several machines."""
    return _package("ray", "ray", "ray")


def require_ray() -> Any:
    """The module; UserError that says how to get it."""
    if not (probe := ray()).available:
        raise UserError(f"--executor ray: {probe.detail}; {install_extra('ray')}")
    return importlib.import_module("ray")


def cxx_compiler() -> Probe:
    """The C++ compiler that builds the native library and AOTInductor engines."""
    return _tool("C++ compiler", os.environ.get("CXX", "g++"), "install g++, or set CXX")


def nvcc() -> Probe:
    """The CUDA compiler."""
    return _tool("nvcc", os.environ.get("CUDACXX", "nvcc"), "install the CUDA toolkit, or set CUDACXX")


def _tool(name: str, command: str, advice: str) -> Probe:
    path = shutil.which(command)
    if path is None:
        return Probe(name, False, f"{command} is not on the PATH; {advice}")
    answer = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    version = next((line for line in answer if re.search(r"\d\.\d", line)), "")
    return Probe(name, True, f"{path}: {version}" if version else path)


def at_least(probe: Probe, package: str, oldest: tuple[int, int], advice: str = "") -> Probe:
    """`probe`, not available where its version is below `oldest`; `advice` ends the reason."""
    if not probe.available or tuple(int(part) for part in probe.detail.split(".")[:2]) >= oldest:
        return probe
    wanted = ".".join(map(str, oldest))
    command = f"pip install --upgrade '{package}>={wanted}'"
    return Probe(probe.name, False, f"{probe.detail} is too old; {command}{advice}")


def _on_cuda(probe: Probe) -> Probe:
    if not probe.available or not (reason := _no_cuda()):
        return probe
    return Probe(probe.name, False, f"{probe.detail}, but {reason}")


@cache
def _package(name: str, module: str, extra: str) -> Probe:
    """Whether `module` imports. Its own failures are of any kind: torch_tensorrt raises a bare Exception."""
    advice = install_extra(extra) if extra else "reinstall ubgen"
    if not _installed(module):
        return Probe(name, False, f"not installed; {advice}")
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Probe(name, False, f"installed, but its import fails: {reason}")
    root = importlib.import_module(module.removesuffix(".ops"))
    return Probe(name, True, str(getattr(root, "__version__", "unknown version")))


def _installed(module: str) -> bool:
    """By its files alone: a namespace such as `nvidia` is shared by many packages, so each part is looked up."""
    root, *parts = module.split(".")
    spec = importlib.util.find_spec(root)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not parts:
        return spec is not None
    return any((Path(place) / name).exists() for place in places for name in (parts[0], f"{parts[0]}.py"))
