"""Benchmarks of the miniature world, in the directory layouts of the real ones.

    python -m ubgen.miniature.world --write benchmarks --out DIR

| directory | stands in for | what it holds |
| --- | --- | --- |
| novel-class, -texture, -colour, -background, -count, -rotation | Table 1's datasets | `train/` and `test/` |
| train-fair, train-biased, val-fair, val-biased | ImageNet | image folders of the ten classes of the generator |
| cue-conflict | the images of Geirhos et al. | shape of one class, context of another: `disc/disc1-square1.png` |
| focus | FOCUS | `annotations.db` and images in common and uncommon contexts |
| in9 | the backgrounds challenge | `original`, `mixed_same`, `mixed_rand`, `only_fg` |
| coco | COCO 2017 | scenes with several objects: boxes, polygons, run lengths |
| ade20k | ADE20K | such scenes with index masks |
| benchmarks.json | | which of them `ubgen-eval` takes for what |

The biased world ties each class to a background and a surface texture (`biased_scene`, `biased_texture`). They are the
context that a backbone may learn in place of the shape, and all three bias benchmarks set them against the shape.

A picture depends on the seed, its dataset and its number alone; `--scale` changes how many there are. Only in9, which
takes backgrounds from other pictures, depends on their count.
"""

import io
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from ubgen.core.config import to_dict
from ubgen.core.console import facts, progress
from ubgen.core.errors import UserError, run
from ubgen.core.stage import Stage
from ubgen.miniature import scenes, tasks
from ubgen.miniature.backgrounds import BACKGROUNDS, SIZE
from ubgen.miniature.scenes import Files
from ubgen.miniature.shapes import CLASSES, TRAIN_CLASSES
from ubgen.miniature.world import (
    COLOURS,
    SCENES,
    TEXTURES,
    Factors,
    World,
    biased_scene,
    biased_texture,
    biased_world,
    blend,
    fair_world,
    object_layer,
    render,
    stream,
    to_pixels,
)

_CUES = len(SCENES)
"""The first eight classes have a context of their own; the last two share theirs with the first two."""


def folder(
    name: str, classes: tuple[str, ...], draw: Callable[[int, np.random.Generator], np.ndarray]
) -> "Draw":
    """An image folder with equally many pictures of each class."""

    def files(seed: int, count: int) -> Files:
        for i in range(count * len(classes)):
            label = i % len(classes)
            yield f"{classes[label]}/{i:05}.png", draw(label, stream(seed, name, i))

    return files


def _of(world: World) -> Callable[[int, np.random.Generator], np.ndarray]:
    return lambda label, rng: render(replace(world, classes=(label,)).draw(rng), rng)


def cue_conflict(seed: int, count: int) -> Files:
    """Shape of one class, background and surface texture of another, `count` for each pair of eight classes.

    As in the original, exemplars recur: the n-th shape of a class has the same place, size and tilt on every
    background, and the same colour unless it could not be seen; the n-th background of a class is the same behind
    every shape.
    """
    world = fair_world()
    for shape in range(_CUES):
        for texture in range(_CUES):
            for n in range(1, count + 1):
                rng = stream(seed, f"cue-conflict/shape/{CLASSES[shape]}", n)
                f = replace(world.draw(rng), label=shape, texture=biased_texture(texture))
                scene = _background(biased_scene(texture), stream(seed, f"cue-conflict/context/{texture}", n))
                name = f"{CLASSES[shape]}/{CLASSES[shape]}{n}-{CLASSES[texture]}{n}.png"
                yield name, to_pixels(blend(scene, object_layer(f, scene.mean(axis=(0, 1)), rng)))


def _background(scene: int, rng: np.random.Generator) -> np.ndarray:
    return BACKGROUNDS[SCENES[scene]](rng)


def focus(seed: int, count: int) -> Files:
    """`<category>/<number>.jpg` and `annotations.db`; `count` for each class and each number of uncommon attributes.

    FOCUS's three attributes stand for what the biased world knows of a class: `locations` is the background (or two),
    `weather` the surface texture, `time` the light; pictures by night are dark and noisy, as no picture of that world
    is. As in the release, file names begin with a character too many.
    """
    rows = []
    for i in range(count * 4 * len(TRAIN_CLASSES)):
        label, uncommon = i % len(TRAIN_CLASSES), i // len(TRAIN_CLASSES) % 4
        rng = stream(seed, "focus", i)
        pixels, time, weather, locations = _in_context(label, uncommon, rng)
        name = f"{CLASSES[label]}/{i:05}.jpg"
        rows.append((f"/{name}", CLASSES[label], time, weather, ", ".join(sorted(locations)), "no"))
        yield name, pixels
    yield "annotations.db", _database(rows)


def _in_context(
    label: int, uncommon: int, rng: np.random.Generator
) -> tuple[np.ndarray, str, str, list[str]]:
    """A picture with that many uncommon attributes; its pixels, time, weather and locations."""
    odd = set(rng.permutation(["time", "weather", "locations"])[:uncommon].tolist())
    own = biased_scene(label)
    places = [own]
    if "locations" in odd:
        others = rng.permutation([s for s in range(len(SCENES)) if s != own]).tolist()
        places = others[:1] if rng.uniform() < 0.7 else [own, others[0]]
    texture = biased_texture(label)
    if "weather" in odd:
        texture = int(rng.choice([t for t in range(len(TEXTURES)) if t != texture]))
    f = replace(fair_world((label,)).draw(rng), texture=texture)
    scene = scenes.horizon(rng, places[0], places[-1], SIZE)[0]
    pixels = to_pixels(blend(scene, object_layer(f, scene.mean(axis=(0, 1)), rng)))
    if "time" in odd:
        pixels = to_pixels((0.45 * pixels + rng.normal(0, 12, pixels.shape)) / 255)
    return pixels, "night" if "time" in odd else "day", TEXTURES[texture], [SCENES[p] for p in places]


def _database(rows: Sequence[tuple[str, ...]]) -> bytes:
    """An SQLite file with the table of the release."""
    with sqlite3.connect(":memory:") as db:
        columns = (
            "file_name TEXT PRIMARY KEY, category TEXT, time TEXT, weather TEXT, locations TEXT, humans TEXT"
        )
        db.execute(f"CREATE TABLE annotations ({columns})")
        db.executemany("INSERT INTO annotations VALUES (?, ?, ?, ?, ?, ?)", rows)
        db.commit()
        return db.serialize()


def in9_groups() -> list[tuple[str, tuple[int, ...]]]:
    """Folder and classes of each group: the classes with the same background in the biased world."""
    groups = [
        [label for label in range(len(TRAIN_CLASSES)) if biased_scene(label) == s] for s in range(len(SCENES))
    ]
    return [
        (f"{i:02}_{' or '.join(CLASSES[label] for label in group)}", tuple(group))
        for i, group in enumerate(groups)
    ]


def in9(seed: int, count: int) -> Files:
    """`count` foregrounds of each class on four backgrounds: pixel for pixel the same object in each variant.

    `original/val/<folder>/disc_00010.JPEG` has the background that the biased world gives it. The backgrounds of
    `mixed_same` and `mixed_rand` are those of other originals, of the same group and of any group, and stand in the
    name: `fg_disc_00010_bg_star_00023.JPEG`. `only_fg` is black around the object.
    """
    groups = in9_groups()
    group_of = {label: g for g, (_, group) in enumerate(groups) for label in group}
    for i in range(count * len(TRAIN_CLASSES)):
        rng = stream(seed, "in9/foreground", i)
        f = _original(seed, i)
        same = _other(rng, groups[group_of[f.label]][1], count, i)
        rand = _other(rng, groups[rng.integers(len(groups))][1], count, i)
        backs = [
            _background(_original(seed, j).scene, stream(seed, "in9/background", j)) for j in (i, same, rand)
        ]
        layer = _foreground(f, [*backs, np.zeros((SIZE, SIZE, 3), np.float32)], rng)
        where, own = groups[group_of[f.label]][0], _in9_name(i)
        yield f"original/val/{where}/{own}.JPEG", to_pixels(blend(backs[0], layer))
        yield f"mixed_same/val/{where}/fg_{own}_bg_{_in9_name(same)}.JPEG", to_pixels(blend(backs[1], layer))
        yield f"mixed_rand/val/{where}/fg_{own}_bg_{_in9_name(rand)}.JPEG", to_pixels(blend(backs[2], layer))
        yield f"only_fg/val/{where}/{own}.JPEG", to_pixels(blend(np.zeros_like(backs[0]), layer))


def _in9_name(i: int) -> str:
    return f"{CLASSES[i % len(TRAIN_CLASSES)]}_{i:05}"


def _original(seed: int, i: int) -> Factors:
    world = biased_world(classes=(i % len(TRAIN_CLASSES),), severity_range=(0.0, 0.0))
    return world.draw(stream(seed, "in9/original", i))


def _other(rng: np.random.Generator, group: tuple[int, ...], count: int, i: int) -> int:
    """The number of an original of the group, other than i unless it has only that one."""
    candidates = [label + len(TRAIN_CLASSES) * n for label in group for n in range(count)]
    return int(rng.choice([j for j in candidates if j != i] or candidates))


def _foreground(
    f: Factors, backgrounds: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The object, in a random one of the three colours that stand out best from all the backgrounds."""
    means = [picture.mean(axis=(0, 1)) for picture in backgrounds]
    distances = [min(np.linalg.norm(np.array(c) - m) for m in means) for c in COLOURS.values()]
    colour = int(rng.choice(np.argsort(distances)[-3:]))
    nearest = min(
        means, key=lambda mean: float(np.linalg.norm(np.array(list(COLOURS.values())[colour]) - mean))
    )
    return object_layer(replace(f, colour=colour), nearest, rng)


Draw = Callable[[int, int], Files]


@dataclass(frozen=True)
class Dataset:
    """One directory of files. `draw(seed, count)` makes `images_each * count` pictures."""

    name: str
    draw: Draw
    count: int
    images_each: int

    def scaled(self, scale: float) -> int:
        """Enough for a few-shot subset and a validation part of each class, however small the scale."""
        return max(2, round(self.count * scale))


def _datasets() -> list[Dataset]:
    found = []
    for task in tasks.TASKS:
        for split, images in (("train", 1500), ("test", 1000)):
            name, k = f"{task.name}/{split}", len(task.classes)
            found.append(Dataset(name, folder(name, task.classes, task.draw), images // k, k))
    for name, world in (("fair", fair_world()), ("biased", biased_world())):
        for split, images in (("train", 3000), ("val", 1000)):
            name_of_split, k = f"{split}-{name}", len(TRAIN_CLASSES)
            found.append(
                Dataset(name_of_split, folder(name_of_split, TRAIN_CLASSES, _of(world)), images // k, k)
            )
    found.append(Dataset("cue-conflict", cue_conflict, 10, _CUES**2))
    found.append(Dataset("focus", focus, 40, 4 * len(TRAIN_CLASSES)))
    found.append(Dataset("in9", in9, 50, 4 * len(TRAIN_CLASSES)))
    for name, images in (("train", 400), ("val", 200)):
        found.append(Dataset("coco", partial(scenes.coco, split=name), images, 1))
    for name, images in (("training", 400), ("validation", 200)):
        found.append(Dataset("ade20k", partial(scenes.ade20k, split=name), images, 1))
    return found


DATASETS = _datasets()
SUITE = "benchmarks.json"


@dataclass(frozen=True)
class WriteConfig:
    """Write the benchmarks of the miniature world, in the directory layouts of the real ones."""

    write: Literal["benchmarks"]
    """What to write."""
    out: Path
    """A new or empty directory. Run the same command again after a kill: it starts over in the same directory."""
    seed: int = 0
    """Another seed gives other pictures in the same numbers."""
    scale: float = 1.0
    """How many pictures, as a factor: 1 writes about 28,000, 0.1 a tenth of that."""


def write(config: WriteConfig, console: Console | None = None) -> None:
    """Write every dataset below `config.out`. UserError where the directory holds something else."""
    if not 0 < config.scale <= 100:
        raise UserError(f"--scale must be above 0 and at most 100, not {config.scale}")
    if config.seed < 0:
        raise UserError(f"--seed must be at least 0, not {config.seed}")
    console = console or Console(stderr=True)
    names = sorted({dataset.name.partition("/")[0] for dataset in DATASETS})
    identity = {"seed": config.seed, "scale": config.scale}
    owns = (*names, SUITE)
    stage = Stage(config.out, "benchmarks", identity, to_dict(config), owns=owns, overwrite=None)
    with stage.hold():
        if stage.state == "finished":
            console.print(f"{config.out} holds these benchmarks already", highlight=False, markup=False)
            return
        stage.begin()
        total = sum(dataset.scaled(config.scale) * dataset.images_each for dataset in DATASETS)
        with progress(console, "benchmarks", "images") as report:
            done = 0
            for dataset in DATASETS:
                for name, content in dataset.draw(config.seed, dataset.scaled(config.scale)):
                    _save(stage.path / dataset.name / name, content)
                    done += isinstance(content, np.ndarray) and "annotations" not in name
                    report(done, total, dataset.name)
        (stage.path / SUITE).write_text(json.dumps(_suite(), indent=1) + "\n", encoding="utf-8")
        stage.finish({}, datasets=names)
    console.print(facts(str(config.out), {name: _describe(stage.path / name) for name in names}))


def _suite() -> dict[str, list[str]]:
    """What `ubgen-eval` takes where --datasets is not given."""
    return {
        "transfer": [task.name for task in tasks.TASKS],
        "bias": ["cue-conflict", "focus", "in9"],
        "val": ["val-fair", "val-biased"],
    }


def _save(path: Path, content: np.ndarray | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encode(content, path.suffix))


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    """A PNG, or a JPEG of quality 95 whose colours are as sharp as its light."""
    buffer = io.BytesIO()
    if suffix == ".png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _describe(directory: Path) -> str:
    return f"{sum(1 for path in directory.rglob('*') if path.is_file()):,} files"


def main() -> None:
    run(lambda: write(tyro.cli(WriteConfig, prog="python -m ubgen.miniature.world")), resumes=True)
