"""The mean of the LoRA over the last updates."""

from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Stochastic weight averaging (Izmailov et al. 2018): two players circle around what they approach.

    `add` after each update that counts; `apply` puts the mean in place of the weights, its change of the UNet's weights
    multiplied by `strength`.
    """

    def __init__(self, parameters: list[nn.Parameter], strength: float) -> None:
        self._parameters = parameters
        self._factor = strength**0.5  # for either of the two matrices whose product is a layer's change
        self._sums = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total += parameter
        self._count += 1

    @torch.no_grad()
    def apply(self) -> None:
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.copy_(total / self._count * self._factor)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums: list[Tensor] = state["sums"]
        for total, saved in zip(self._sums, sums, strict=True):
            total.copy_(saved)
        self._count = int(state["count"])
