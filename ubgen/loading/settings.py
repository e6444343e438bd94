"""The options of loading; free of PyTorch, so that a command's `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

CROP_RATIO = 224 / 256
Loader = Literal["auto", "threads", "dali"]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; the defaults are the paper's (Table 6)."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Its aspect ratio."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name for RandAugment's setting; "" for none."""
    erasing: float = 0.25
    """Probability of erasing a rectangle with pixel noise."""
