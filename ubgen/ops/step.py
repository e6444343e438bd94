"""Classifier-free guidance and a sampler's update of the latents in one pass over memory."""

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ubgen.ops import native

MAX_HISTORY = 3
_Pointers = ctypes.c_void_p * MAX_HISTORY
_Floats = ctypes.c_float * (MAX_HISTORY + 1)
_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transform: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def guided_step(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor,
    history: Sequence[Tensor],
    a: float,
    b: float,
    guidance: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """One guided sampler update. Returns (x_next, e), contiguous, shaped and typed as `x`.

        e      = e_uncond + guidance * (e_cond - e_uncond)
        E      = weights[0] * e + sum_k weights[k] * history[k - 1]
        x_next = a * x + b * E

    All tensors and the 0..3 of `history` (newest first) share shape, dtype and device; `weights` has one value more
    than `history`.

    PNDM: keep `e` as the newest history of the next call, with the weights of Adams-Bashforth (Liu et al. 2022,
    "Pseudo Numerical Methods for Diffusion Models", Eq. 12) and `a`, `b` of its transfer, Eq. 11. DDIM (Song et al.
    2021, Eq. 12 with sigma 0): no history, weights [1]. DDPM (Ho et al. 2020, Algorithm 2): the same, then its noise.
    `ubgen.diffusion.schedule` has the coefficients.

    float32 runs in the native library where that was built, with the same bits as `guided_step_reference`. The
    reference runs for every other dtype (float16 and bfloat16 are computed in float32 and rounded once), and wherever
    PyTorch has to see the arithmetic: gradients, traces, compilation, transforms. ValueError when shapes or lengths
    disagree.
    """
    tensors = (x, e_uncond, e_cond, *history)
    _check(tensors, len(history), weights)
    call = native.function("guided_step_f32", x.device.type) if _plain_float32(tensors) else None
    if call is None:
        x_next, e = guided_step_reference(x, e_uncond, e_cond, history, a, b, guidance, weights)
        return x_next.contiguous(), e.contiguous()
    # bound to names: a contiguous copy must live until the call returns
    x, e_uncond, e_cond, *past = (tensor.contiguous() for tensor in tensors)
    x_next, e = torch.empty_like(x), torch.empty_like(x)
    pointers = _Pointers(*[tensor.data_ptr() for tensor in past]) if past else None
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        call(
            *(
                x.data_ptr(),
                e_uncond.data_ptr(),
                e_cond.data_ptr(),
                pointers,
                len(past),
                _floats(tuple(weights)),
            ),
            *(a, b, guidance, x_next.data_ptr(), e.data_ptr(), x.numel()),
        )
    return x_next, e


def guided_step_reference(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor,
    history: Sequence[Tensor],
    a: float,
    b: float,
    guidance: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """`guided_step` in plain PyTorch: what the native library must equal, and what runs without it."""
    e = _wide(e_uncond)
    e = e + guidance * (_wide(e_cond) - e)
    combined = weights[0] * e
    for weight, past in zip(weights[1:], history, strict=True):
        combined = combined + weight * _wide(past)
    x_next = a * _wide(x) + b * combined
    return x_next.to(x.dtype), e.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """The type of the arithmetic: float32, or float64 where the input has it."""
    return x if x.dtype == torch.float64 else x.float()


def _check(tensors: Sequence[Tensor], depth: int, weights: Sequence[float]) -> None:
    if depth > MAX_HISTORY or len(weights) != depth + 1:
        raise ValueError(
            f"guided_step: {depth} history tensors (at most {MAX_HISTORY}) need {depth + 1} weights, "
            f"not {len(weights)}"
        )
    x = tensors[0]
    for other in tensors[1:]:
        if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"guided_step: all tensors must be like x, {tuple(x.shape)} {x.dtype} on {x.device}; "
                f"got {tuple(other.shape)} {other.dtype} on {other.device}"
            )


def _plain_float32(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing would notice that the kernel takes the memory past PyTorch's dispatcher.

    That is: no gradient, trace, compilation, transform, dispatch mode or tensor subclass. False also when a future
    PyTorch no longer tells.
    """
    if tensors[0].dtype != torch.float32 or _modes is None or _transform is None:
        return False
    if torch.compiler.is_compiling() or _is_tracing() or _modes() or _transform() is not None:
        return False
    if any(type(tensor) is not Tensor and type(tensor) is not Parameter for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


@lru_cache(maxsize=256)  # a sampler has few sets of weights: PNDM four
def _floats(weights: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return _Floats(*weights)
