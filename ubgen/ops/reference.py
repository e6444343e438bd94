"""The operations in plain PyTorch: what the native library must equal, and what runs without it."""

from collections.abc import Sequence

from torch import Tensor


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
    """Guidance, then a linear multistep update; see `ubgen.ops.guided_step`."""
    e = e_uncond + guidance * (e_cond - e_uncond)
    combined = weights[0] * e
    for weight, past in zip(weights[1:], history, strict=True):
        combined = combined + weight * past
    return a * x + b * combined, e
