"""Networks that do nothing: what is left of synthesis is its own cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ubgen.synth.generator import Scored
from ubgen.synth.plan import Item


class Nothing:
    """A fixed picture for every sample, so that it can be encoded and written but costs nothing to make."""

    lanes = 1

    def __init__(self, batch: int = 64, side: int = 256) -> None:
        self.batch = batch
        self._picture = _picture(side)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def denoise(self, items: Sequence[Item]) -> Tensor:
        return torch.zeros(len(items), 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self._picture.expand(len(latents), -1, -1, -1)

    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored:
        ones = torch.ones(len(items))
        return Scored(pixels, 0.3 * ones, 4.0 * ones, ones.bool(), ~ones.bool())

    def same_bits(self) -> dict[str, bool]:
        return {"position": True, "size": True}


def _picture(side: int) -> Tensor:
    """(1,side,side,3) uint8: smooth shapes and a little grain, about as large as a photo of the same size in JPEG."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = torch.stack(
        [torch.sin(9 * x + 5 * y), torch.cos(7 * y * x), torch.sin(20 * (x - y) ** 2)], dim=-1
    )
    grain = torch.randn(side, side, 1, generator=torch.Generator().manual_seed(0))
    return (128 + 80 * waves + 4 * grain).clamp(0, 255).to(torch.uint8).unsqueeze(0)
