"""The operations in plain PyTorch: what the native library must equal, and what runs without it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ubgen.ops.bicubic import resize_weights


def _wide(x: Tensor) -> Tensor:
    """The type of the arithmetic: float32, or float64 where the input has it."""
    return x if x.dtype == torch.float64 else x.float()


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
    """Guidance, then a linear multistep update; see `ubgen.ops.guided_step`."""
    e = _wide(e_uncond)
    if e_cond is not None:
        e = e + guidance * (_wide(e_cond) - e)
    combined = weights[0] * e
    for weight, past in zip(weights[1:], history, strict=True):
        combined = combined + weight * _wide(past)
    x_next = a * _wide(x) + b * combined
    if noise is not None:
        x_next = x_next + s * _wide(noise)
    return x_next.to(x.dtype), e.to(x.dtype)


def quantise(images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bytes (B, H, W, 3), then minimum, maximum and count of non-finite values; see `ubgen.ops.quantise`."""
    wide = _wide(images_B3HW)
    unit = torch.nan_to_num(wide, nan=0.0).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    values = wide.flatten(1)
    finite, inf = values.isfinite(), torch.full((len(values), 1), float("inf")).to(wide)
    minimum = torch.cat([torch.where(finite, values, inf), inf], dim=1).amin(dim=1)
    maximum = torch.cat([torch.where(finite, values, -inf), -inf], dim=1).amax(dim=1)
    return pixels, minimum.float(), maximum.float(), (~finite).sum(dim=1)


def resize_normalise(
    pixels_BHW3: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    border: Sequence[int] | None = None,
) -> Tensor:
    """Pad, resize as two matrix products, normalise; see `ubgen.ops.resize_normalise`."""
    images = pixels_BHW3.permute(0, 3, 1, 2).float()
    if border is not None:
        images = _on_square(images, border)
    for dim in (3, 2):
        weights = torch.from_numpy(resize_weights(images.shape[dim], size)).to(images)
        images = torch.movedim(torch.movedim(images, dim, -1) @ weights.T, -1, dim)
        if border is not None:
            images = images.clamp(0, 255)
    mean_311, std_311 = (torch.tensor(list(v)).to(images)[:, None, None] for v in (mean, std))
    return ((images / 255 - mean_311) / std_311).contiguous()


def _on_square(images_B3HW: Tensor, colour: Sequence[int]) -> Tensor:
    """An odd remainder pixel goes to the bottom or to the right."""
    batch, _, height, width = images_B3HW.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.tensor(list(colour)).to(images_B3HW)[:, None, None].repeat(batch, 1, side, side)
    square[:, :, top : top + height, left : left + width] = images_B3HW
    return square


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Group normalisation, then SiLU; see `ubgen.ops.group_norm_silu`."""
    wide = _wide(x)
    return F.silu(F.group_norm(wide, groups, weight.to(wide), bias.to(wide), eps)).to(x.dtype)
