"""Predictions beside the annotations, for a person to look at."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ubgen.evaluate.dense.ade20k import IGNORED

SHOWN = 8
_TILE, _SCORE = 256, 0.3


def fixed_images(count: int) -> list[int]:
    """Eight images, spread over the validation set."""
    return sorted(set(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()))


def colour(label: int) -> tuple[int, int, int]:
    """Of a class; neighbours in number differ in hue."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 1.0 if label % 2 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_objects(pixels: np.ndarray, objects: Mapping[str, Any], names: Sequence[str]) -> Image.Image:
    """Boxes, masks and names; of predictions those with a score of at least 0.3."""
    target = {key: torch.as_tensor(np.ascontiguousarray(value)) for key, value in objects.items()}
    keep = (
        target["scores"] >= _SCORE
        if "scores" in target
        else torch.ones(len(target["labels"]), dtype=torch.bool)
    )
    drawn = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    labels = target["labels"][keep].tolist()
    if labels:
        colours: list[Any] = [colour(label) for label in labels]
        masks = target["masks"][keep].reshape(len(labels), *pixels.shape[:2]) > 0.5
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.5, colors=colours)
        texts = [names[label - 1] for label in labels]
        drawn = draw_bounding_boxes(drawn, target["boxes"][keep], labels=texts, colors=colours)
    return _image(drawn)


def with_classes(pixels: np.ndarray, labels: np.ndarray, classes: int) -> Image.Image:
    """Every pixel tinted in the colour of its class."""
    table = np.array([colour(label) for label in range(classes)], np.float32)
    known = labels != IGNORED
    tint = table[np.where(known, labels, 0)]
    mixed = np.where(known[..., None], 0.35 * pixels + 0.65 * tint, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Annotations above, predictions below, a column for each image."""
    page = Image.new("RGB", (len(pairs) * _TILE, 2 * _TILE), "white")
    for column, pair in enumerate(pairs):
        for row, picture in enumerate(pair):
            scale = (_TILE - 4) / max(picture.size)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            page.paste(picture.resize(size), (column * _TILE + 2, row * _TILE + 2))
    return page


def _image(drawn: Tensor) -> Image.Image:
    return Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy())
