"""The options of a pre-training run.

Defaults are those of Table 6 for ResNet-50; where it is silent, those of ConvNeXt's released recipe, which it follows.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ubgen.core.errors import UserError
from ubgen.loading.settings import CROP_RATIO, Augmentation, Loader

SHORT_RUN = 50_000  # updates; below, an EMA of 0.9999 without a warm-up still holds the random start


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run."""

    model: str = "resnet50"
    """timm's name of the network."""
    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int | None = None
    """Patch side of a vision transformer; its own if not given."""
    epochs: int = 120
    """Passes over the dataset."""
    warmup_epochs: int = 12
    """Of these, the first, in which the learning rate rises linearly from 0."""
    batch_size: int = 2048
    """Images per update, over all processes and accumulation steps."""
    micro_batch: int = 128
    """The most images that a process puts through the network at once: lower it when memory runs out."""
    lr: float = 1e-3
    """Highest learning rate of AdamW; it is not scaled with the batch size."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """AdamW's weight decay; not on biases, other 1-d tensors, and what the network itself names."""
    drop_path: float = 0.1
    """Stochastic depth: highest probability of leaving out a block, linear over depth."""
    label_smoothing: float = 0.1
    """Label smoothing, within mixup's targets."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0: none."""
    mix_switch: float = 0.5
    """Probability of CutMix instead of mixup, where both are on."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights."""
    ema_warmup: Literal["auto", "on", "off"] = "auto"
    """Decay min(ema_decay, (1 + n) / (10 + n)) after n updates; "auto": in runs under 50,000 updates."""
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Autocast's type; "no": float32."""
    channels_last: bool = True
    """Memory layout of the network and its inputs."""
    compile: bool = False
    """Compile the network with torch.compile."""
    crop_ratio: float = CROP_RATIO
    """In evaluation, the share of the shorter side that the centre crop takes."""
    evaluate_every: int = 10
    """Epochs between evaluations on the validation set; the last epoch is always evaluated."""
    checkpoint_every: int = 500
    """Updates between checkpoints; the end of an epoch has one, too."""
    seed: int = 42
    """Seed of every random number of the run."""
    loader: Loader = "auto"
    """What decodes and augments: threads with timm's transforms, or NVIDIA DALI. "auto" takes threads on a CPU."""
    threads: int = 0
    """Loader threads of each process; 0: one for each processor."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded, and list them in skipped.txt, instead of stopping."""
    num_classes: int | None = None
    """Number of classes that the dataset must have."""
    classes: str | None = None
    """Class list that gives the labels of WebDataset tars their class ids."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" uses a GPU if there is one."""


def validate(config: PretrainConfig) -> None:
    """UserError naming the first option whose value makes no sense."""
    for name in ("image_size", "epochs", "batch_size", "micro_batch", "evaluate_every", "checkpoint_every"):
        _require(getattr(config, name) >= 1, name, "positive", getattr(config, name))
    for name in ("lr", "eps"):
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, name, "positive", value)
    for name in ("min_lr", "weight_decay", "mixup", "cutmix", "threads", "warmup_epochs"):
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= 0, name, "0 or more", value)
    for name in ("drop_path", "label_smoothing", "ema_decay"):
        value = getattr(config, name)
        _require(0 <= value < 1, name, "at least 0 and below 1", value)
    _require(0 <= config.mix_switch <= 1, "mix_switch", "between 0 and 1", config.mix_switch)
    _require(0 < config.crop_ratio <= 1, "crop_ratio", "above 0 and at most 1", config.crop_ratio)
    _require(config.warmup_epochs < config.epochs, "warmup_epochs", "below epochs", config.warmup_epochs)
    _check_augmentation(config.augmentation)


def _check_augmentation(settings: Augmentation) -> None:
    for name in ("flip", "erasing"):
        value = getattr(settings, name)
        _require(0 <= value <= 1, f"augmentation.{name}", "between 0 and 1", value)
    for name, (low, high) in (("crop_area", settings.crop_area), ("crop_aspect", settings.crop_aspect)):
        _require(0 < low <= high, f"augmentation.{name}", "two rising positive numbers", f"{low} and {high}")
    _require(settings.crop_area[1] <= 1, "augmentation.crop_area", "at most 1", settings.crop_area[1])
    text = settings.rand_augment
    _require(
        not text or text.startswith("rand-"), "augmentation.rand_augment", 'timm\'s "rand-..." or empty', text
    )


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise UserError(f"{name} must be {wanted}, not {value}")


def passes(config: PretrainConfig, processes: int) -> tuple[int, int]:
    """Accumulation steps of an update, and images of each step and process.

    As few steps as `micro_batch` allows; all have the same, even number of images, as mixup needs it. UserError where
    `batch_size` cannot be cut so.
    """
    each, left = divmod(config.batch_size, processes)
    if left == 0:
        for steps in range(math.ceil(each / config.micro_batch), each // 2 + 1):
            if each % steps == 0 and each // steps % 2 == 0:
                return steps, each // steps
    raise UserError(
        f"batch_size {config.batch_size} cannot be cut into even parts of at most micro_batch "
        f"({config.micro_batch}) images on {processes} process(es); choose a multiple of {2 * processes}"
    )
