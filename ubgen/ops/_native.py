"""Finds and loads the native library, once; everything else asks `native_status` or `library`."""

import ctypes
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch  # noqa: F401  loaded first, so that the library shares torch's OpenMP thread pool

_SWITCH = "UBGEN_DISABLE_NATIVE"
_CPU, _CUDA = "libubgen_kernels.so", "libubgen_kernels_cuda.so"
_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_GUIDED_STEP: list[Any] = [
    *(_POINTER, _POINTER, _POINTER),  # x, e_uncond, e_cond
    *(_POINTER, _INT, _POINTER),  # history, history_count, weights
    *(_FLOAT, _FLOAT, _FLOAT),  # a, b, guidance
    *(_POINTER, _POINTER, ctypes.c_int64),  # x_next, e, count
]


def native_status() -> tuple[bool, str]:
    """(True, path of the CPU library) or (False, why the PyTorch reference runs instead)."""
    loaded, detail = _load_cpu()
    return loaded is not None, detail


def cuda_status() -> tuple[bool, str]:
    """The same for the library of CUDA kernels."""
    loaded, detail = _load_cuda()
    return loaded is not None, detail


def library(device_type: str) -> ctypes.CDLL | None:
    """The library for tensors on "cpu" or "cuda"; None where there is none."""
    if device_type == "cpu":
        return _load_cpu()[0]
    return _load_cuda()[0] if device_type == "cuda" else None


@cache
def _load_cpu() -> tuple[ctypes.CDLL | None, str]:
    loaded, detail = _load(_CPU, "no C++ compiler was found when ubgen was installed")
    if loaded:
        loaded.ubgen_guided_step_f32.argtypes = [*_GUIDED_STEP, _INT]
    return loaded, detail


@cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    loaded, detail = _load(_CUDA, "no nvcc was found when ubgen was installed")
    if loaded:
        loaded.ubgen_guided_step_f32_cuda.argtypes = [*_GUIDED_STEP, _POINTER]
        loaded.ubgen_cuda_error.restype = ctypes.c_char_p
    return loaded, detail


def _load(name: str, missing: str) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(_SWITCH, "0") not in ("", "0"):
        return None, f"switched off by {_SWITCH}"
    path = _find(name)
    if path is None:
        return None, f"{name} was not built: {missing}"
    try:
        return ctypes.CDLL(str(path)), str(path)
    except OSError as error:
        return None, f"{path} does not load: {error}"


def _find(name: str) -> Path | None:
    """Beside this file in a regular install; an editable one keeps it in site-packages, listed as a file of ours."""
    beside = Path(__file__).resolve().parent / "_lib" / name
    if beside.is_file():
        return beside
    try:
        files = metadata.files("ubgen") or []
    except metadata.PackageNotFoundError:
        return None
    located = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in located if path.is_file()), None)
