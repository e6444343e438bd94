"""Classifier-free guidance and the PNDM update of the latents in one pass over memory."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ubgen.ops import _native, reference

MAX_HISTORY = 3


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
    """One guided linear-multistep update. Returns (x_next, e), shaped and typed as `x`, contiguous.

        e      = e_uncond + guidance * (e_cond - e_uncond)
        E      = weights[0] * e + sum_k weights[k] * history[k - 1]
        x_next = a * x + b * E

    `x`, `e_uncond`, `e_cond` and the 0..3 tensors of `history` (newest first) share shape, dtype and device; `weights`
    has one value more than `history`. Keep `e` as the newest history of the next call. For PNDM the weights are those
    of Adams-Bashforth (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models", Eq. 12), and `a`, `b` those
    of its transfer, Eq. 11.

    float32 runs in the native library where that was built, with the same bits as `ubgen.ops.reference`; any other
    dtype runs there. Differentiable in every tensor. ValueError when shapes or lengths disagree.
    """
    _check(x, [e_uncond, e_cond, *history], weights)
    return _guided_step(x, e_uncond, e_cond, list(history), a, b, guidance, list(weights))


def _check(x: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> None:
    depth = len(others) - 2
    if depth > MAX_HISTORY or len(weights) != depth + 1:
        raise ValueError(
            f"guided_step: {depth} history tensors (at most {MAX_HISTORY}) need {depth + 1} weights, "
            f"not {len(weights)}"
        )
    for other in others:
        if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"guided_step: all tensors must be like x, {tuple(x.shape)} {x.dtype} on {x.device}; "
                f"got {tuple(other.shape)} {other.dtype} on {other.device}"
            )


@torch.library.custom_op("ubgen::guided_step", mutates_args=())
def _guided_step(
    x: Tensor,
    e_uncond: Tensor,
    e_cond: Tensor,
    history: list[Tensor],
    a: float,
    b: float,
    guidance: float,
    weights: list[float],
) -> tuple[Tensor, Tensor]:
    library = _native.library(x.device.type) if x.dtype == torch.float32 else None
    if library is None:
        x_next, e = reference.guided_step(x, e_uncond, e_cond, history, a, b, guidance, weights)
        return x_next.contiguous(), e.contiguous()
    x_next, e = _outputs(x)
    # bound to names: a contiguous copy must live until the call returns
    inputs = [tensor.contiguous() for tensor in (x, e_uncond, e_cond)]
    past = [tensor.contiguous() for tensor in history]
    arguments = (
        *(tensor.data_ptr() for tensor in inputs),
        (ctypes.c_void_p * MAX_HISTORY)(*(tensor.data_ptr() for tensor in past)),
        len(past),
        (ctypes.c_float * (MAX_HISTORY + 1))(*weights),
        *(a, b, guidance, x_next.data_ptr(), e.data_ptr(), x.numel()),
    )
    _call(library, x.device, arguments)
    return x_next, e


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(x, memory_format=dense)


def _call(library: ctypes.CDLL, device: torch.device, arguments: tuple[object, ...]) -> None:
    if device.type == "cpu":
        status = library.ubgen_guided_step_f32(*arguments, torch.get_num_threads())
        reason = "bad argument"
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            status = library.ubgen_guided_step_f32_cuda(*arguments, stream)
        reason = library.ubgen_cuda_error().decode()
    if status:
        raise RuntimeError(f"guided_step: native library returned {status} ({reason})")


@_guided_step.register_fake
def _(x, e_uncond, e_cond, history, a, b, guidance, weights):  # type: ignore[no-untyped-def]
    return _outputs(x)


def _keep_coefficients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *_, ctx.a, ctx.b, ctx.guidance, ctx.weights = inputs


def _backward(ctx, grad_next: Tensor, grad_e: Tensor):  # type: ignore[no-untyped-def]
    """The step is linear in its tensors, so nothing of the forward pass is kept."""
    grad_combined = ctx.b * grad_next
    grad_guided = grad_e + ctx.weights[0] * grad_combined
    history = [weight * grad_combined for weight in ctx.weights[1:]]
    uncond, cond = (1 - ctx.guidance) * grad_guided, ctx.guidance * grad_guided
    return ctx.a * grad_next, uncond, cond, history, None, None, None, None


_guided_step.register_autograd(_backward, setup_context=_keep_coefficients)
