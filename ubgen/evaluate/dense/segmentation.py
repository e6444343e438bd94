"""UPerNet: the heads of transformers, with the settings of MMSegmentation's base configuration."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.dense.ade20k import IGNORED
from ubgen.evaluate.dense.settings import SegmentSettings
from ubgen.evaluate.dense.stages import Stages


class UperNet(nn.Module):
    """Images (B, 3, H, W) in [0, 1]; with labels (B, H, W) -> losses, without -> logits (B, K, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, classes: int, settings: SegmentSettings) -> None:
        super().__init__()
        self.stages = Stages(backbone)
        config = UperNetConfig(
            hidden_size=settings.channels,
            num_labels=classes,
            auxiliary_channels=settings.auxiliary_channels,
        )
        self.decode_head: Any = UperNetHead(config, self.stages.channels)
        self.auxiliary_head: Any = UperNetFCNHead(config, self.stages.channels)
        self.auxiliary_weight = settings.auxiliary_weight
        for head in (self.decode_head, self.auxiliary_head):
            _initialise(head)
            head.classifier = nn.Sequential(nn.Dropout2d(settings.dropout), head.classifier)
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        # NaN: where an image was smaller than the crop
        maps = self.stages(torch.nan_to_num((images - self.mean) / self.std, nan=0.0))
        logits = _resized(self.decode_head(maps), images)
        if labels is None:
            return logits
        auxiliary = _resized(self.auxiliary_head(maps), images)
        return {
            "loss_decode": _loss(logits, labels),
            "loss_auxiliary": self.auxiliary_weight * _loss(auxiliary, labels),
        }


def _resized(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the pixels that count; 0 where none does."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _initialise(head: nn.Module) -> None:
    """As MMSegmentation: He's normal for the convolutions, a deviation of 0.01 for the classifier."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    classifier: Any = head.classifier
    nn.init.normal_(classifier.weight, std=0.01)
