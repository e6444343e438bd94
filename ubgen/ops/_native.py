"""Finds and loads the native libraries, once, and calls their functions."""

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch  # loaded first, so that the library shares its OpenMP thread pool

_SWITCH = "UBGEN_DISABLE_NATIVE"
_PLACE = "UBGEN_NATIVE_DIR"
_CPU, _CUDA = "libubgen_kernels.so", "libubgen_kernels_cuda.so"
_POINTER, _FLOAT, _INT, _LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The element types of the native operations, with their numbers in kernels.h."""

# As in kernels.h, without the last argument: `threads` on a CPU, `stream` on a GPU.
_SIGNATURES: dict[str, list[Any]] = {
    "guided_step": [
        *(_INT, _POINTER, _POINTER, _POINTER),  # dtype, x, e_uncond, e_cond
        *(_POINTER, _INT, _POINTER, _POINTER),  # history, history_count, noise, weights
        *(_FLOAT, _FLOAT, _FLOAT, _FLOAT),  # a, b, guidance, s
        *(_POINTER, _POINTER, _LONG),  # x_next, e, count
    ],
    "quantise": [
        *(_INT, _INT, _POINTER, _LONG, _LONG, _LONG),  # dtype, layout, images, batch, height, width
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # pixels, minimum, maximum, nonfinite
    ],
    "resize_normalise": [
        *(_POINTER, _LONG, _LONG, _LONG),  # pixels, batch, height, width
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # across, down, framing, out
    ],
    "group_norm_silu": [
        *(_INT, _INT, _POINTER, _POINTER, _POINTER),  # dtype, layout, x, weight, bias
        *(_LONG, _LONG, _LONG, _LONG, _FLOAT, _POINTER),  # batch, channels, area, groups, eps, y
    ],
}
_ONLY_CUDA = {"group_norm_silu": [_POINTER]}  # workspace
_NOTHING = nullcontext()
_STATUS = {1: "bad argument", 2: "CUDA error", 3: "out of memory"}


def native_status() -> tuple[bool, str]:
    """(True, path of the CPU library) or (False, why the PyTorch reference runs instead)."""
    loaded, detail = _load_cpu()
    return loaded is not None, detail


def cuda_status() -> tuple[bool, str]:
    """The same for the library of CUDA kernels."""
    loaded, detail = _load_cuda()
    return loaded is not None, detail


@cache
def function(name: str, device_type: str) -> Callable[..., None] | None:
    """The native operation for tensors on "cpu" or "cuda"; None where the PyTorch reference has to run.

    Called with the arguments of kernels.h up to the last one, which it adds. RuntimeError when it fails.
    """
    if device_type == "cpu" and (cpu := _load_cpu()[0]) is not None:
        return _on_cpu(name, getattr(cpu, f"ubgen_{name}"))
    if device_type == "cuda" and (cuda := _load_cuda()[0]) is not None:
        return _on_cuda(name, getattr(cuda, f"ubgen_{name}_cuda"), cuda)
    return None


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """The tensor's GPU as the current one; nothing for a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NOTHING


def library(device_type: str) -> ctypes.CDLL | None:
    """The library itself, for its few other functions."""
    return {"cpu": _load_cpu, "cuda": _load_cuda}[device_type]()[0]


def _on_cpu(name: str, call: Callable[..., int]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        if status := call(*arguments, torch.get_num_threads()):
            raise RuntimeError(f"{name}: the native library returned {status} ({_STATUS.get(status)})")

    return run


def _on_cuda(name: str, call: Callable[..., int], cuda: ctypes.CDLL) -> Callable[..., None]:
    """Runs on the current device, which `device_of` sets, and its current stream."""

    def run(*arguments: object) -> None:
        if status := call(*arguments, torch.cuda.current_stream().cuda_stream):
            reason = cuda.ubgen_cuda_error().decode() if status == 2 else _STATUS.get(status)
            raise RuntimeError(f"{name}: the native library returned {status} ({reason})")

    return run


@cache
def _load_cpu() -> tuple[ctypes.CDLL | None, str]:
    return _load(_CPU, "no C++ compiler was found when ubgen was installed", _declare_cpu)


@cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    return _load(_CUDA, "no nvcc was found when ubgen was installed", _declare_cuda)


def _declare_cpu(cpu: ctypes.CDLL) -> None:
    for name, signature in _SIGNATURES.items():
        getattr(cpu, f"ubgen_{name}").argtypes = [*signature, _INT]
    cpu.ubgen_cpu.restype = ctypes.c_char_p


def _declare_cuda(cuda: ctypes.CDLL) -> None:
    for name, signature in _SIGNATURES.items():
        getattr(cuda, f"ubgen_{name}_cuda").argtypes = [*signature, *_ONLY_CUDA.get(name, []), _POINTER]
    cuda.ubgen_cuda_error.restype = ctypes.c_char_p
    cuda.ubgen_group_norm_silu_workspace.argtypes = [_INT, _LONG, _LONG, _LONG]
    cuda.ubgen_group_norm_silu_workspace.restype = _LONG


def _load(name: str, missing: str, declare: Callable[[ctypes.CDLL], None]) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(_SWITCH, "0") not in ("", "0"):
        return None, f"switched off by {_SWITCH}"
    path = _find(name)
    if path is None:
        return None, f"{name} was not built: {missing}"
    try:
        loaded = ctypes.CDLL(str(path))
        declare(loaded)
    except (OSError, AttributeError) as error:  # the latter: an older build without some function
        return None, f"{path} does not load: {error}; install ubgen again"
    return loaded, str(path)


def _find(name: str) -> Path | None:
    """In the directory that UBGEN_NATIVE_DIR names, for a build that was not installed; else beside this file, where a
    regular install has it, or in site-packages as a file of ours, where an editable one keeps it."""
    if directory := os.environ.get(_PLACE):
        named = Path(directory) / name
        return named if named.is_file() else None
    beside = Path(__file__).resolve().parent / "_lib" / name
    if beside.is_file():
        return beside
    try:
        files = metadata.files("ubgen") or []
    except metadata.PackageNotFoundError:
        return None
    located = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in located if path.is_file()), None)
