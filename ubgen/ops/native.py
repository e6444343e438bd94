"""Finds and loads the native libraries, once, and calls their functions."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch  # loaded first, so that the library shares its OpenMP thread pool

_SWITCH = "UBGEN_DISABLE_NATIVE"
_DIRECTORY = "UBGEN_NATIVE_DIR"
_CPU, _CUDA = "libubgen_kernels.so", "libubgen_kernels_cuda.so"
_POINTER, _FLOAT, _INT, _LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64

# As in kernels.h, without the last argument: `threads` on a CPU, `stream` on a GPU.
_SIGNATURES = {
    "guided_step_f32": [
        *(
            _POINTER,
            _POINTER,
            _POINTER,
            _POINTER,
            _INT,
            _POINTER,
        ),  # x, e_uncond, e_cond, history, its count, weights
        *(_FLOAT, _FLOAT, _FLOAT, _POINTER, _POINTER, _LONG),  # a, b, guidance, x_next, e, count
    ],
}
_STATUS = {1: "bad argument", 2: "CUDA error"}


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

    Called with the arguments of kernels.h up to the last one, which it adds. A CUDA operation runs on the current
    device and stream. RuntimeError when it fails.
    """
    if device_type == "cpu" and (cpu := _load_cpu()[0]) is not None:
        return _on_cpu(name, getattr(cpu, f"ubgen_{name}"))
    if device_type == "cuda" and (cuda := _load_cuda()[0]) is not None:
        return _on_cuda(name, getattr(cuda, f"ubgen_{name}_cuda"), cuda)
    return None


def _on_cpu(name: str, call: Callable[..., int]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        if status := call(*arguments, torch.get_num_threads()):
            raise RuntimeError(f"{name}: the native library returned {status} ({_STATUS.get(status)})")

    return run


def _on_cuda(name: str, call: Callable[..., int], cuda: ctypes.CDLL) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        if status := call(*arguments, torch.cuda.current_stream().cuda_stream):
            reason = cuda.ubgen_cuda_error().decode() if status == 2 else _STATUS.get(status)
            raise RuntimeError(f"{name}: the native library returned {status} ({reason})")

    return run


@cache
def _load_cpu() -> tuple[ctypes.CDLL | None, str]:
    loaded, detail = _load(_CPU, "no C++ compiler was found when ubgen was installed", "", _INT)
    return loaded, detail


@cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    loaded, detail = _load(_CUDA, "no nvcc was found when ubgen was installed", "_cuda", _POINTER)
    if loaded is not None:
        loaded.ubgen_cuda_error.restype = ctypes.c_char_p
    return loaded, detail


def _load(name: str, missing: str, suffix: str, last: object) -> tuple[ctypes.CDLL | None, str]:
    """The library, its functions declared; `last` is the type of their last argument."""
    if os.environ.get(_SWITCH, "0") not in ("", "0"):
        return None, f"switched off by {_SWITCH}"
    path = _find(name)
    if path is None:
        return None, f"{name} was not built: {missing}"
    try:
        loaded = ctypes.CDLL(str(path))
        for operation, signature in _SIGNATURES.items():
            getattr(loaded, f"ubgen_{operation}{suffix}").argtypes = [*signature, last]
    except (OSError, AttributeError) as error:  # the latter: an older build without some function
        return None, f"{path} does not load: {error}; install ubgen again"
    return loaded, str(path)


def _find(name: str) -> Path | None:
    """In the directory that UBGEN_NATIVE_DIR names, for a build that was not installed; else beside this file, where a
    regular install has it, or in site-packages as a file of ours, where an editable one keeps it."""
    if directory := os.environ.get(_DIRECTORY):
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
