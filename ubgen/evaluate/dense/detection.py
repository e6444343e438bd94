"""Mask R-CNN with a feature pyramid: torchvision's, with the settings of MMDetection's base configuration."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.dense.settings import DetectSettings
from ubgen.evaluate.dense.stages import Stages

_LEVELS = ["0", "1", "2", "3"]
_ADAPTIVE = 0  # sampling points of a RoI follow its size


def build_mask_rcnn(backbone: Backbone, classes: int, settings: DetectSettings) -> MaskRCNN:
    """In training (images, targets) -> losses; in evaluation images -> boxes, labels (from 1), scores, masks.

    Images are (3, H, W) in [0, 1] of any sizes; the network resizes and normalises them, with the backbone's mean and
    deviation. torchvision's except for what MMDetection does otherwise: L1 losses of the boxes, adaptive sampling of
    regions, 1,000 proposals in training, and the backbone's batch normalisation (see `Stages`).
    """
    stages = Stages(backbone, settings.frozen_stages, settings.frozen_norm)
    outputs = classes + 1  # and the background
    channels, hidden = settings.channels, settings.hidden
    pool, mask_pool = (MultiScaleRoIAlign(_LEVELS, size, _ADAPTIVE) for size in (7, 14))
    model = MaskRCNN(
        _Pyramid(stages, channels),
        min_size=settings.short_side,
        max_size=settings.long_side,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((settings.anchor * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_train=2000,
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, outputs),
        box_batch_size_per_image=settings.rois,
        mask_roi_pool=mask_pool,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, outputs),
    )
    model.rpn.__class__ = _Proposals  # the same parts and weights, with another loss
    model.roi_heads.__class__ = _Regions
    return model


class _Pyramid(nn.Module):
    def __init__(self, stages: Stages, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = stages, channels
        self.fpn = FeaturePyramidNetwork(stages.channels, channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        maps = self.body(images)
        levels: Mapping[str, Tensor] = self.fpn(OrderedDict(zip(_LEVELS, maps, strict=True)))
        return levels


class _Proposals(RegionProposalNetwork):
    """With L1 in place of the smooth L1 of width 1/9."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(torch.cat(sides))[0] for sides in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted, targets = torch.cat(labels), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum")
        logits = objectness.flatten()[sampled]
        return F.binary_cross_entropy_with_logits(logits, wanted[sampled]), boxes / max(sampled.numel(), 1)


class _Regions(RoIHeads):
    """With L1 in place of the smooth L1 of width 1/9; in evaluation torchvision's own."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            result: Any = super().forward(features, proposals, image_shapes)
            return result
        assert targets is not None
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        losses = box_losses(logits, deltas, labels, regression)
        positive = [torch.where(each > 0)[0] for each in labels]
        boxes = [each[at] for each, at in zip(proposals, positive, strict=True)]
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        losses["loss_mask"] = maskrcnn_loss(
            masks,
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [each[at] for each, at in zip(matched, positive, strict=True)],
        )
        return [], losses


def box_losses(
    logits: Tensor, deltas: Tensor, labels: Sequence[Tensor], regression: Sequence[Tensor]
) -> dict[str, Tensor]:
    """logits (N, K), deltas (N, 4 K), of each image labels and regression targets; both are means over all N regions.

    torchvision's `fastrcnn_loss` with L1 (MMDetection's).
    """
    wanted, targets = torch.cat(list(labels)), torch.cat(list(regression))
    at = torch.where(wanted > 0)[0]
    chosen = deltas.reshape(len(deltas), -1, 4)[at, wanted[at]]
    boxes = F.l1_loss(chosen, targets[at], reduction="sum") / wanted.numel()
    return {"loss_classifier": F.cross_entropy(logits, wanted), "loss_box_reg": boxes}
