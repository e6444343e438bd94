"""A backbone that says what is painted: its answer is the class whose colour an image has."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ubgen.core.classes import load_classes
from ubgen.evaluate.backbone import Backbone

MEAN, STD = (0.31, 0.52, 0.44), (0.2, 0.35, 0.15)  # not ImageNet's


@cache
def ids_of(classes: str) -> tuple[str, ...]:
    return load_classes(classes).ids


def colour(number: int) -> tuple[int, int, int]:
    """A colour for each of 1,000 classes."""
    return 25 * (number // 100), 25 * (number // 10 % 10), 25 * (number % 10)


class Colours(nn.Module):
    """Logits: how near the mean colour of the image's middle is to each class's colour."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("colours", torch.tensor([colour(i) for i in range(classes)]) / 255)

    def forward_features(self, images: Tensor) -> Tensor:
        return images

    def forward_head(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        size = images.shape[-1]
        middle = (images * std + mean)[..., size // 4 : -size // 4, size // 4 : -size // 4].mean((2, 3))
        return -1000 * torch.cdist(middle, self.colours)


@pytest.fixture(scope="session")
def seer() -> Callable[..., Backbone]:
    """Makes such a backbone, of ImageNet's classes or others."""

    def make(class_ids: Sequence[str] | None = None, image_size: int = 32, **changes: object) -> Backbone:
        ids = tuple(ids_of("imagenet1k") if class_ids is None else class_ids)
        values = {
            "name": "seer",
            "model_name": "colours",
            "identity": f"sha256:{len(ids)}",
            "image_size": image_size,
            "mean": MEAN,
            "std": STD,
            "crop_ratio": 0.875,
            "interpolation": "bicubic",
            "class_ids": ids,
            "dim": 0,
            "outputs": len(ids),
            "network": Colours(len(ids)),
            "device": torch.device("cpu"),
            "precision": "no",
        }
        return Backbone(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def paint() -> Callable[..., Path]:
    """Writes an image that the backbone takes for the given class."""

    def write(
        path: Path, class_id: str, size: tuple[int, int] = (32, 32), classes: str = "imagenet1k"
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size[1], size[0], 3), colour(ids_of(classes).index(class_id)), np.uint8)
        Image.fromarray(pixels).save(
            path, **({} if path.suffix == ".png" else {"quality": 100, "subsampling": 0})
        )
        return path

    return write
