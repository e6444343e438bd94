"""Scenes with several objects, and their annotations in the layouts of COCO and of ADE20K.

Objects are the novel classes. A few objects of the generator's classes lie between them, without annotation: they are
what COCO leaves out and ADE20K calls other.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ubgen.miniature import quality
from ubgen.miniature.backgrounds import BACKGROUNDS
from ubgen.miniature.shapes import CLASSES, NOVEL_CLASSES, TRAIN_CLASSES
from ubgen.miniature.world import (
    SCENES,
    Factors,
    blend,
    coverage,
    fair_world,
    object_layer,
    outlines,
    stream,
    to_pixels,
)

_CANVAS = 128
_SHAPES = ((128, 128), (96, 128), (128, 96))  # height, width
_LEAST = 40  # pixels of an object that must stay visible
STUFF = SCENES
"""ADE20K's labels 1 to 8; the novel classes are 9 to 18."""


@dataclass(frozen=True)
class Instance:
    """An object or, as `crowd`, a heap of small objects of one class."""

    label: int
    """Index into CLASSES."""
    mask: np.ndarray
    """(H, W) bool: where it can be seen."""
    polygon: np.ndarray | None
    """(N, 2) x and y of the outline in pixels; None where the outline is not what can be seen: occluded, with a hole,
    over the border, a crowd."""
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    pixels: np.ndarray
    """uint8 (H, W, 3)."""
    stuff: np.ndarray
    """(H, W) index into SCENES: the background, under the objects too."""
    instances: tuple[Instance, ...]


def horizon(rng: np.random.Generator, upper: int, lower: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two backgrounds, one above the other: (size, size, 3) in [0, 1], and (size, size) indices into SCENES."""
    if upper == lower:
        return BACKGROUNDS[SCENES[upper]](rng, size), np.full((size, size), upper)
    pictures = [BACKGROUNDS[SCENES[scene]](rng, size) for scene in (upper, lower)]
    at = np.arange(size) / size
    line = rng.uniform(0.35, 0.65) + 0.05 * np.sin(2 * np.pi * (rng.uniform(1, 2) * at + rng.uniform()))
    below = at[:, None] >= line[None, :]
    return np.where(below[..., None], pictures[1], pictures[0]), np.where(below, lower, upper)


def draw_scene(rng: np.random.Generator) -> Scene:
    """None to eight objects, and sometimes a crowd, on one or two backgrounds."""
    height, width = _SHAPES[rng.integers(len(_SHAPES))]
    upper, lower = rng.integers(len(SCENES), size=2).tolist()
    shown, stuff = horizon(rng, upper, lower, _CANVAS)
    groups = _groups(rng, height, width)
    mean = shown.mean(axis=(0, 1))
    for f in (f for group in groups for f in group):
        shown = blend(shown, object_layer(f, mean, rng, _CANVAS))
    kind, severity = str(rng.choice(["blur", "jpeg", "contrast"])), rng.uniform(0, 0.25)
    pixels = quality.degrade(to_pixels(shown[:height, :width]), kind, severity, rng)
    return Scene(pixels, stuff[:height, :width], _instances(groups, height, width))


Group = tuple[Factors, ...]


def _groups(rng: np.random.Generator, height: int, width: int) -> list[Group]:
    """Objects from back to front. No two cover each other so much that one cannot be told."""
    if rng.uniform() < 0.03:
        return []  # COCO has images without an object, too
    groups = [_crowd(rng, height, width)] if rng.uniform() < 0.08 else []
    for _ in range(int(rng.integers(2, 9))):
        f = _object(rng, height, width)
        if all(np.hypot(f.x - o.x, f.y - o.y) > 0.8 * (f.radius + o.radius) for g in groups for o in g):
            groups.append((f,))
    return groups


def _object(rng: np.random.Generator, height: int, width: int) -> Factors:
    names = TRAIN_CLASSES if rng.uniform() < 0.12 else NOVEL_CLASSES
    f = fair_world((CLASSES.index(str(rng.choice(names))),)).draw(rng)
    radius = rng.uniform(9, 22)
    x, y = (rng.uniform(0.7 * radius, side - 0.7 * radius) for side in (width, height))
    return replace(f, x=x, y=y, radius=radius, angle=rng.uniform(-30, 30))


def _crowd(rng: np.random.Generator, height: int, width: int) -> Group:
    first = replace(_object(rng, height, width), label=CLASSES.index(str(rng.choice(NOVEL_CLASSES))))
    x, y = rng.uniform(26, width - 26), rng.uniform(20, height - 20)
    return tuple(
        replace(
            first,
            x=x + rng.uniform(-20, 20),
            y=y + rng.uniform(-14, 14),
            radius=rng.uniform(4, 6.5),
            angle=rng.uniform(-40, 40),
            colour=int(rng.integers(8)),
        )
        for _ in range(int(rng.integers(10, 16)))
    )


def _instances(groups: list[Group], height: int, width: int) -> tuple[Instance, ...]:
    """What can be seen of each group, from back to front; what is all but hidden is left out."""
    found = []
    free = np.ones((height, width), bool)
    for group in reversed(groups):
        whole = np.maximum.reduce([coverage(f, _CANVAS) for f in group])[:height, :width] >= 0.5
        mask = whole & free
        free &= ~whole
        if mask.sum() >= _LEAST:
            shape = outlines(group[0])
            limits = (shape[0].min(), (width, height) - shape[0].max(axis=0))
            simple = len(group) == len(shape) == 1 and np.array_equal(mask, whole)
            inside = limits[0] >= 0 and (limits[1] >= 0).all()
            found.append(
                Instance(group[0].label, mask, shape[0] if simple and inside else None, len(group) > 1)
            )
    return tuple(reversed(found))


Files = Iterator[tuple[str, np.ndarray | bytes]]
"""Names below a dataset's directory, with pixels, uint8 (H, W, 3) or (H, W), or with a file's content."""


def coco(seed: int, count: int, split: str) -> Files:
    """`train2017/*.jpg` and `annotations/instances_train2017.json`, and likewise for "val".

    A category's id is its place among all classes of the world, from 1: they are 11 to 20. As in COCO they are not
    where a model's labels begin. Objects are polygons; those that a polygon cannot show, and crowds, are uncompressed
    run lengths.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        scene = draw_scene(stream(seed, f"coco/{split}", i))
        height, width = scene.stuff.shape
        # numbers with gaps, and different ones in both splits, as COCO's are
        number = 7 * i + (1_000_003 if split == "val" else 9)
        name = f"{number:012}.jpg"
        images.append({"id": number, "file_name": name, "height": height, "width": width, "license": 1})
        for instance in scene.instances:
            if CLASSES[instance.label] in NOVEL_CLASSES:
                annotations.append(_annotation(instance, len(annotations) + 1, number))
        yield f"{split}2017/{name}", scene.pixels
    content = {
        "info": {"description": "scenes of the miniature world", "version": "1"},
        "licenses": [{"id": 1, "name": "drawn by a program", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": CLASSES.index(name) + 1, "name": name, "supercategory": "shape"} for name in NOVEL_CLASSES
        ],
    }
    yield f"annotations/instances_{split}2017.json", json.dumps(content).encode()


def _annotation(instance: Instance, number: int, image: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(instance.mask.any(1)), np.flatnonzero(instance.mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    segmentation: Any = run_lengths(instance.mask)
    if instance.polygon is not None:
        segmentation = [[round(float(value), 2) for value in instance.polygon.ravel()]]
    return {
        "id": number,
        "image_id": image,
        "category_id": instance.label + 1,
        "segmentation": segmentation,
        "area": int(instance.mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "iscrowd": int(instance.crowd),
    }


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed form of a mask: lengths of runs of 0 and 1 in turn, down the columns, beginning with 0."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"counts": np.diff(np.concatenate([[0], edges])).tolist(), "size": list(mask.shape)}


def ade20k(seed: int, count: int, split: str) -> Files:
    """`images/training/*.jpg` and `annotations/training/*.png`, and likewise for "validation".

    A mask holds 1 to 8 for the backgrounds and 9 to 18 for the novel classes; 0 is everything else. `objectInfo150.txt`
    names them, as in the release.
    """
    prefix = "train" if split == "training" else "val"
    for i in range(count):
        scene = draw_scene(stream(seed, f"ade20k/{split}", i))
        name = f"ADE_{prefix}_{i + 1:08}"
        yield f"images/{split}/{name}.jpg", scene.pixels
        yield f"annotations/{split}/{name}.png", index_mask(scene)
    yield "objectInfo150.txt", _object_info().encode()


def index_mask(scene: Scene) -> np.ndarray:
    """uint8 (H, W), in ADE20K's numbers."""
    mask = (scene.stuff + 1).astype(np.uint8)
    for instance in scene.instances:
        novel = CLASSES[instance.label] in NOVEL_CLASSES
        mask[instance.mask] = 1 + len(STUFF) + NOVEL_CLASSES.index(CLASSES[instance.label]) if novel else 0
    return mask


def _object_info() -> str:
    """The release's columns; Ratio, Train and Val stay empty, as nothing reads them."""
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [
        f"{i}\t\t\t\t{int(i <= len(STUFF))}\t{name}" for i, name in enumerate((*STUFF, *NOVEL_CLASSES), 1)
    ]
    return "\n".join(rows) + "\n"
