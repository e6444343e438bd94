"""GroupNorm followed by SiLU, the pair in front of every convolution of a diffusion network's residual blocks."""

import torch
from torch import Tensor

from ubgen.ops import _native, reference
from ubgen.ops._direct import direct
from ubgen.ops._layout import as_layout, layout_of, memory_format


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """silu(group_norm(x)) of x (B, C, *), with `weight` and `bias` (C,); shaped and typed as x.

    Group normalisation: Wu and He 2018, Eq. 1 to 6. A contiguous or channels-last x keeps its layout. float16 and
    bfloat16 are computed in float32 and rounded once, where two separate operations round twice. Runs in the native
    library where that was built; float64, and what has no library, in `ubgen.ops.reference`.

    Differentiable once, in x, weight and bias; only these are kept for the backward pass, which normalises again in
    PyTorch. ValueError when the shapes disagree or `groups` does not divide C.
    """
    channels = x.shape[1] if x.ndim >= 2 else 0
    if not channels or groups < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: {groups} groups do not fit x, {tuple(x.shape)}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"group_norm_silu: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({channels},)"
        )
    return (_run if direct(x, weight, bias) else _group_norm_silu)(x, groups, weight, bias, eps)


def _run(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    native = _native.function("group_norm_silu", x.device.type) if x.dtype in _native.DTYPES else None
    y = _output(x)
    if native is None:
        return y.copy_(reference.group_norm_silu(x, groups, weight, bias, eps))
    layout = layout_of(x)
    x, weight, bias = as_layout(x, layout), weight.float().contiguous(), bias.float().contiguous()
    batch, channels = x.shape[:2]
    area = x.numel() // max(batch * channels, 1)
    scratch = _workspace(x, layout, batch, area, groups)
    with _native.device_of(x):
        native(
            *(_native.DTYPES[x.dtype], layout, x.data_ptr(), weight.data_ptr(), bias.data_ptr()),
            *(batch, channels, area, groups, eps, y.data_ptr()),
            *(tensor.data_ptr() for tensor in scratch),
        )
    return y


def _workspace(x: Tensor, layout: int, batch: int, area: int, groups: int) -> list[Tensor]:
    """Only the CUDA function takes one."""
    library = _native.library("cuda") if x.device.type == "cuda" else None
    if library is None:
        return []
    size = library.ubgen_group_norm_silu_workspace(layout, batch, area, groups)
    return [x.new_empty(size, dtype=torch.uint8)]


def _output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(layout_of(x)))


_group_norm_silu = torch.library.custom_op("ubgen::group_norm_silu", _run, mutates_args=())


@_group_norm_silu.register_fake
def _(x, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
    return _output(x)


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.groups, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, bias = ctx.saved_tensors
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, w, b = x.to(wide).contiguous(), weight.to(wide), bias.to(wide)
    batch, channels = x.shape[:2]
    shape = (batch, channels, x.numel() // max(batch * channels, 1), ctx.groups)
    v, mean, rstd = torch.ops.aten.native_group_norm(values, w, b, *shape, ctx.eps)
    grad_v = torch.ops.aten.silu_backward(grad.to(wide).contiguous(), v)
    grad_x, grad_w, grad_b = torch.ops.aten.native_group_norm_backward(
        grad_v, values, mean, rstd, w, *shape, [True, True, True]
    )
    return grad_x.to(x.dtype), None, grad_w.to(weight.dtype), grad_b.to(bias.dtype), None


_group_norm_silu.register_autograd(_backward, setup_context=_keep_inputs)
