"""Datasets of a handful of small scenes, in the layouts of COCO and ADE20K."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CATEGORIES = {3: "car", 18: "dog", 90: "toothbrush"}  # ids with gaps, as COCO's
Edit = Callable[[dict[str, Any]], None]


def object_at(
    number: int, image: int, category: int, box: tuple[int, int, int, int], **more: Any
) -> dict[str, Any]:
    """A rectangle, as a polygon."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [polygon],
        **more,
    }


def write_coco(root: Path, edit: Edit = lambda content: None) -> Path:
    """Six training and three validation images; training image 5 has no objects, 6 only a crowd."""
    rng = np.random.default_rng(0)
    sizes = {1: (48, 64), 2: (64, 48), 3: (48, 64), 4: (64, 64), 5: (48, 64), 6: (64, 48)}
    crowd = {"size": [64, 48], "counts": [0, 640, 64 * 48 - 640]}
    annotations = [
        object_at(1, 1, 3, (4, 6, 20, 16)),
        object_at(2, 1, 90, (30, 8, 24, 30)),
        object_at(3, 2, 18, (5, 5, 30, 40)),
        object_at(4, 3, 18, (2, 2, 40, 40)),
        object_at(5, 4, 90, (10, 10, 40, 44)),
        object_at(6, 4, 3, (0, 0, 0, 12)),  # an empty box
        object_at(7, 6, 3, (0, 0, 10, 64), iscrowd=1, segmentation=crowd),
        object_at(8, 2, 3, (0, 0, 10, 64), iscrowd=1, segmentation=crowd),
    ]
    for split, ids in (("train2017", sizes), ("val2017", (1, 2, 3))):
        (root / split).mkdir(parents=True)
        images = []
        for number in ids:
            height, width = sizes[number]
            name = f"{number:012}.jpg"
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            for each in annotations:
                if each["image_id"] == number:
                    x, y, w, h = each["bbox"]
                    pixels[y : y + h, x : x + w, each["category_id"] % 3] = 230
            Image.fromarray(pixels).save(root / split / name, quality=95)
        content: dict[str, Any] = {
            "images": images,
            "annotations": [dict(a) for a in annotations if a["image_id"] in ids],
            "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        }
        if split == "train2017":
            edit(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_ade20k(root: Path, count: int = 6) -> Path:
    """Three classes: sky above earth, a box between them, a border of "other"."""
    rng = np.random.default_rng(1)
    colours = np.array([[0, 0, 0], [90, 140, 230], [150, 110, 60], [220, 40, 40]])
    for split, prefix, number in (("training", "train", count), ("validation", "val", 3)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(1, number + 1):
            mask = np.ones((40, 56), np.uint8)
            mask[rng.integers(15, 25) :] = 2
            top, left = rng.integers(5, 25), rng.integers(5, 40)
            mask[top : top + 12, left : left + 12] = 3
            mask[:2] = 0
            pixels = colours[mask] + rng.integers(0, 20, (*mask.shape, 3))
            name = f"ADE_{prefix}_{i:08}"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")
    rows = [f"{i}\t0.1\t10\t5\t1\t{name}" for i, name in enumerate(("sky", "earth", "box"), 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


@pytest.fixture
def coco_with(tmp_path: Path) -> Callable[[Edit], Path]:
    """Writes the dataset with a changed file of training annotations."""
    return lambda edit: write_coco(tmp_path / "changed", edit)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    return write_ade20k(tmp_path / "ade20k")
