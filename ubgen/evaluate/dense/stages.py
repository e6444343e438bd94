"""The four stages of a ResNet as a pyramid's input: the networks of both tasks stand on it."""

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.checkpoint import is_head

_REDUCTIONS = [4, 8, 16, 32]
_ORDER = (("conv1", "bn1", "act1", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class Stages(nn.Module):
    """timm's `features_only` network with a backbone's weights: images (B, 3, H, W), normalised -> four maps.

    Their sides are 1/4, 1/8, 1/16 and 1/32 of the image's. `frozen` stages (1: the stem and the first one) keep their
    weights and statistics; with `frozen_norm` all batch normalisation uses the statistics that it came with, and its
    scale and shift are trained, as in MMDetection. UserError for a backbone that is no ResNet.
    """

    def __init__(self, backbone: Backbone, frozen: int = 0, frozen_norm: bool = False) -> None:
        super().__init__()
        name = backbone.model_name
        if not all(
            hasattr(backbone.network, part) for part in ("conv1", "layer1", "layer2", "layer3", "layer4")
        ):
            raise UserError(
                f"backbone {backbone.name}: {name} is no ResNet; detection and segmentation need one"
            )
        self.body: Any = timm.create_model(
            name, features_only=True, pretrained=False, out_indices=(1, 2, 3, 4)
        )
        reductions = self.body.feature_info.reduction()
        if reductions != _REDUCTIONS:
            raise UserError(
                f"backbone {backbone.name}: its stages reduce the image by {reductions}, not {_REDUCTIONS}"
            )
        self.channels: list[int] = self.body.feature_info.channels()
        state = backbone.network.state_dict()
        self.body.load_state_dict(
            {key: value.cpu() for key, value in state.items() if not is_head(key, backbone.network)}
        )
        self.frozen_norm = frozen_norm
        self._frozen = [
            module for group in (_ORDER[: frozen + 1] if frozen else ()) for module in self._named(group)
        ]
        for module in self._frozen:
            module.requires_grad_(False)

    def _named(self, names: tuple[str, ...]) -> Iterator[nn.Module]:
        return (module for name, module in self.body.named_children() if name in names)

    def train(self, mode: bool = True) -> "Stages":
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body(images)
        return maps


def as_tensor(pixels: Any) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
