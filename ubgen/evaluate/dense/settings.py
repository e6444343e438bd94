"""The settings of detection and segmentation; free of PyTorch, so that a command's `--help` is quick.

Defaults are those of MMDetection's mask-rcnn_r50_fpn_1x_coco and MMSegmentation's upernet_r50 at 160k iterations.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ubgen.core.errors import UserError


@dataclass(frozen=True)
class DenseRun:
    """What is trained on what."""

    backbone: str
    """A directory of ubgen-pretrain, timm:MODEL@FILE, or random:MODEL[@SEED]; a ResNet of timm."""
    data: Path
    """The dataset's directory, in the layout of its release."""
    out: Path = Path("runs/eval")
    """Directory for the results; it belongs to one backbone."""
    fraction: float = 1.0
    """Share of the training images."""
    seeds: int = 1
    """Trainings; a seed draws the share, the order and the initial heads. Figures are means over them."""
    seed: int = 0
    """The first seed; the others follow it."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of the backbone's run."""
    device: Literal["auto", "cpu"] = "auto"
    """ "auto" uses a GPU if there is one."""
    threads: int = 0
    """Loader threads of each process; 0: one for each processor."""
    overwrite: bool = False
    """Train again; what is there of the same evaluation is removed."""
    stop_after: int | None = None
    """Stop after so many updates, with a checkpoint; the same command continues."""

    def check(self) -> None:
        """UserError naming the first option that makes no sense."""
        _require(0 < self.fraction <= 1, "fraction", "above 0 and at most 1", self.fraction)
        _require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        _require(self.seed >= 0 and self.threads >= 0, "seed and --threads", "0 or more", "a negative number")
        _require(self.stop_after is None or self.stop_after > 0, "stop-after", "positive", self.stop_after)


@dataclass(frozen=True)
class Training:
    """What both tasks share."""

    batch_size: int = 16
    """Images per update, over all processes; a multiple of the number of processes."""
    momentum: float = 0.9
    """SGD's momentum."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast's type; "no": float32."""
    checkpoint_every: int = 500
    """Updates between checkpoints; the end of an epoch has one, too."""
    evaluate_every: int = 1
    """Epochs between evaluations on the validation images; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "evaluate_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)


@dataclass(frozen=True)
class DetectSettings(Training):
    """Mask R-CNN with a feature pyramid, the 1x schedule."""

    lr: float = 0.02
    """Of SGD for 16 images; scaled in proportion to --batch-size."""
    weight_decay: float = 1e-4
    """SGD's weight decay."""
    epochs: int = 12
    """Passes over the images, whatever share of them is used."""
    drops: tuple[int, ...] = (8, 11)
    """The learning rate is divided by 10 after these epochs."""
    warmup: int = 500
    """First updates, in which the learning rate rises linearly from a thousandth."""
    short_side: int = 800
    """Images are resized to this shorter side, unless the longer one would exceed --long-side."""
    long_side: int = 1333
    """Longest side of a resized image."""
    least_side: int = 32
    """Training images with a side below it are left out."""
    anchor: int = 32
    """Side of the smallest anchors in pixels; each of the five levels doubles it."""
    frozen_stages: int = 1
    """How much of the backbone keeps its weights: 0 nothing, 1 the stem and the first stage, up to 4."""
    frozen_norm: bool = True
    """The backbone's batch normalisation uses the statistics of the pre-training."""
    channels: int = 256
    """Of the pyramid and the mask head."""
    hidden: int = 1024
    """Width of the two fully connected layers of the box head."""
    rois: int = 512
    """Regions per image in the box head's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "epochs", "short_side", "anchor", "channels", "hidden", "rois"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, "positive", value)
        for name in ("warmup", "weight_decay", "least_side"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.long_side >= self.short_side, "long_side", "at least --short-side", self.long_side)
        _require(0 <= self.frozen_stages <= 4, "frozen_stages", "0 to 4", self.frozen_stages)


@dataclass(frozen=True)
class SegmentSettings(Training):
    """UPerNet with an auxiliary head, the schedule of 160,000 iterations."""

    evaluate_every: int = 13
    """Epochs between evaluations on the validation images; the last update is always followed by one."""
    lr: float = 0.01
    """Of SGD for 16 images; scaled in proportion to --batch-size."""
    least_lr: float = 1e-4
    """Where the polynomial of power 0.9 ends; scaled like --lr."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    iterations: int = 160_000
    """Updates with all training images; a share of the images has the same share of updates. Economical: 80000."""
    short_side: int = 512
    """Images are resized to this shorter side, unless the longer one would exceed --long-side."""
    long_side: int = 2048
    """Longest side of a resized image."""
    scales: tuple[float, float] = (0.5, 2.0)
    """In training both sides are multiplied by a number from this range."""
    crop: int = 512
    """Side of the training crop."""
    channels: int = 512
    """Of the decoder."""
    auxiliary_channels: int = 256
    """Of the auxiliary head on the third stage."""
    auxiliary_weight: float = 0.4
    """Of the auxiliary head's loss."""
    dropout: float = 0.1
    """Before the classifier of both heads, of whole channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "iterations", "short_side", "crop", "channels", "auxiliary_channels"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, "positive", value)
        for name in ("least_lr", "weight_decay", "auxiliary_weight"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.long_side >= self.short_side, "long_side", "at least --short-side", self.long_side)
        _require(0 < self.scales[0] <= self.scales[1], "scales", "two rising positive numbers", self.scales)
        _require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)


@dataclass(frozen=True)
class DenseRecipe:
    """A recipe file: a table for each task."""

    detect: DetectSettings = field(default_factory=DetectSettings)
    segment: SegmentSettings = field(default_factory=SegmentSettings)


def updates_per_epoch(images: int, settings: Training) -> int:
    """Updates in a pass over so many images; the last batch is filled up."""
    return -(-images // settings.batch_size)


def segmentation_updates(fraction: float, settings: SegmentSettings) -> int:
    return max(1, round(settings.iterations * fraction))


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
