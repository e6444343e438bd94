"""Classifier-free guidance and a sampler's update of the latents in one pass over memory."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ubgen.ops import _native, reference
from ubgen.ops._direct import direct

MAX_HISTORY = 3


def guided_step(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor | None,
    history: Sequence[Tensor],
    a: float,
    b: float,
    guidance: float,
    weights: Sequence[float],
    *,
    noise: Tensor | None = None,
    s: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One guided sampler update. Returns (x_next, e), shaped and typed as `x`.

        e      = e_uncond + guidance * (e_cond - e_uncond)
        E      = weights[0] * e + sum_k weights[k] * history[k - 1]
        x_next = a * x + b * E + s * noise

    A network with guidance inside gives e itself: pass it as `e_uncond` with `e_cond` None, and get it back.
    Without `noise`, its term is left out. All tensors and the 0..3 of `history` (newest first) share shape, dtype
    and device; `weights` has one value more than `history`.

    PNDM: keep `e` as the newest history of the next call, with the weights of Adams-Bashforth (Liu et al. 2022,
    "Pseudo Numerical Methods for Diffusion Models", Eq. 12) and `a`, `b` of its transfer, Eq. 11. DDIM (Song et al.
    2021, Eq. 12 with sigma 0): no history, weights [1]. DDPM (Ho et al. 2020, Algorithm 2): the same with its noise.
    `ubgen.diffusion.schedule` has the coefficients.

    float16 and bfloat16 are computed in float32 and rounded once. Runs in the native library where that was built,
    with the same bits as `ubgen.ops.reference`; float64 runs there. Differentiable in every tensor. ValueError when
    shapes or lengths disagree.
    """
    _check(x, e_uncond, e_cond, history, noise, weights)
    if direct(x, e_uncond, e_cond, noise, *history):
        x_next, e = _run(x, e_uncond, e_cond, history, noise, a, b, guidance, s, weights)
    else:
        x_next, e = _guided_step(x, e_uncond, e_cond, list(history), noise, a, b, guidance, s, list(weights))
    return x_next, (e_uncond if e is None or e_cond is None else e)


def _check(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    weights: Sequence[float],
) -> None:
    depth = len(history)
    if depth > MAX_HISTORY or len(weights) != depth + 1:
        raise ValueError(
            f"guided_step: {depth} history tensors (at most {MAX_HISTORY}) need {depth + 1} weights, "
            f"not {len(weights)}"
        )
    shape, dtype, device = x.shape, x.dtype, x.device
    for other in (e_uncond, e_cond, noise, *history):
        if other is not None and (other.shape != shape or other.dtype != dtype or other.device != device):
            raise ValueError(
                f"guided_step: all tensors must be like x, {tuple(shape)} {dtype} on {device}; "
                f"got {tuple(other.shape)} {other.dtype} on {other.device}"
            )


def _run(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    a: float,
    b: float,
    guidance: float,
    s: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    """The update, and e where `e_cond` is given. Small steps take no longer than Python's part, so it spares calls."""
    kind = _native.DTYPES.get(x.dtype)
    native = None if kind is None else _native.function("guided_step", "cuda" if x.is_cuda else x.device.type)
    if native is None:
        x_next, e = reference.guided_step(
            x, e_uncond, e_cond, history, a, b, guidance, weights, noise=noise, s=s
        )
        return x_next.contiguous(), (None if e_cond is None else e.contiguous())
    x_next, e_next = _like(x), (None if e_cond is None else _like(x))
    # bound to names: a contiguous copy must live until the call returns
    x, e_uncond = x.contiguous(), e_uncond.contiguous()
    e_cond, noise = _dense(e_cond), _dense(noise)
    past = [tensor.contiguous() for tensor in history]
    places = _Pointers(*[tensor.data_ptr() for tensor in past]) if past else None
    inputs = (x.data_ptr(), e_uncond.data_ptr(), _at(e_cond), places, len(past), _at(noise))
    outputs = (x_next.data_ptr(), _at(e_next), x.numel())
    with _native.device_of(x):
        native(kind, *inputs, _floats(tuple(weights)), a, b, guidance, s, *outputs)
    return x_next, e_next


_Pointers = ctypes.c_void_p * MAX_HISTORY
_Floats = ctypes.c_float * (MAX_HISTORY + 1)


@lru_cache(maxsize=256)  # a sampler has few sets of weights: PNDM four
def _floats(weights: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return _Floats(*weights)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _operator(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    a: float,
    b: float,
    guidance: float,
    s: float,
    weights: list[float],
) -> tuple[Tensor, Tensor]:
    """`_run` as PyTorch wants its operators: always two tensors, none of them an input; the second is empty where
    there is no `e_cond`."""
    x_next, e = _run(x, e_uncond, e_cond, history, noise, a, b, guidance, s, weights)
    return x_next, (x.new_empty(0) if e is None else e)


_guided_step = torch.library.custom_op("ubgen::guided_step", _operator, mutates_args=())


@_guided_step.register_fake
def _(x, e_uncond, e_cond, history, noise, a, b, guidance, s, weights):  # type: ignore[no-untyped-def]
    return _like(x), (x.new_empty(0) if e_cond is None else _like(x))


def _keep_coefficients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, e_cond, _, noise, ctx.a, ctx.b, ctx.guidance, ctx.s, ctx.weights = inputs
    ctx.guided, ctx.noisy = e_cond is not None, noise is not None


def _backward(ctx, grad_next: Tensor, grad_e: Tensor):  # type: ignore[no-untyped-def]
    """The step is linear in its tensors, so nothing of the forward pass is kept."""
    grad_combined = ctx.b * grad_next
    grad_guided = ctx.weights[0] * grad_combined
    uncond, cond = grad_guided, None
    if ctx.guided:
        grad_guided = grad_e + grad_guided
        uncond, cond = (1 - ctx.guidance) * grad_guided, ctx.guidance * grad_guided
    history = [weight * grad_combined for weight in ctx.weights[1:]]
    noise = ctx.s * grad_next if ctx.noisy else None
    return ctx.a * grad_next, uncond, cond, history, noise, None, None, None, None, None


_guided_step.register_autograd(_backward, setup_context=_keep_coefficients)
