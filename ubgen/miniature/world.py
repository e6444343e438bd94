"""The miniature world: a procedural renderer of 64x64 images whose factors are drawn independently.

A `World` is a set of probability tables. In the fair world every factor is independent of the class; in the
biased world background and surface texture follow the class with a stated strength, as they do in photographs
from the web (a "boat" is mostly seen on water).

    python -m ubgen.miniature.world --write benchmarks --out DIR

writes the benchmarks of `ubgen.miniature.benchmarks`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ubgen.miniature import quality
from ubgen.miniature.backgrounds import BACKGROUNDS, SIZE
from ubgen.miniature.shapes import CLASSES, SHAPES, TRAIN_CLASSES

SCENES: tuple[str, ...] = tuple(BACKGROUNDS)
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16), "orange": (0.96, 0.55, 0.10), "yellow": (0.96, 0.88, 0.22),
    "green": (0.16, 0.72, 0.30), "blue": (0.18, 0.32, 0.86), "purple": (0.62, 0.24, 0.76),
    "white": (0.96, 0.96, 0.96), "black": (0.08, 0.08, 0.08),
}  # fmt: skip
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Factors:
    """What one image shows. Indices point into CLASSES, SCENES, TEXTURES and COLOURS."""

    label: int
    scene: int
    texture: int
    colour: int
    x: float  # centre, in pixels
    y: float
    radius: float  # pixels
    angle: float  # degrees
    kind: str  # of degradation
    severity: float  # in [0, 1]


@dataclass(frozen=True)
class World:
    """Probability tables, one per factor. Rows of `scene_given_class` and `texture_given_class` sum to 1."""

    classes: tuple[int, ...]
    scene_given_class: np.ndarray  # (20, 8)
    texture_given_class: np.ndarray  # (20, 4)
    kind_probabilities: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    severity_range: tuple[float, float] = (0.0, 1.0)
    radius_range: tuple[float, float] = (15.0, 24.0)
    angle_range: tuple[float, float] = (-20.0, 20.0)
    colour_probabilities: tuple[float, ...] = field(default=(1 / 8,) * 8)

    def draw(self, rng: np.random.Generator) -> Factors:
        label = int(rng.choice(self.classes))
        radius = rng.uniform(*self.radius_range)
        room = max(SIZE / 2 - radius - 1, 0.0)
        return Factors(
            label=label,
            scene=int(rng.choice(len(SCENES), p=self.scene_given_class[label])),
            texture=int(rng.choice(len(TEXTURES), p=self.texture_given_class[label])),
            colour=int(rng.choice(len(COLOURS), p=self.colour_probabilities)),
            x=SIZE / 2 + rng.uniform(-room, room),
            y=SIZE / 2 + rng.uniform(-room, room),
            radius=radius,
            angle=rng.uniform(*self.angle_range),
            kind=str(rng.choice(quality.KINDS, p=self.kind_probabilities)),
            severity=rng.uniform(*self.severity_range),
        )


def biased_scene(label: int) -> int:
    """The background that goes with a class in the biased world."""
    return label % len(SCENES)


def biased_texture(label: int) -> int:
    return label % len(TEXTURES)


def _tied(choice: Callable[[int], int], options: int, strength: float) -> np.ndarray:
    """(20, options): `strength` on the tied option, the rest spread evenly over all options."""
    table = np.full((len(CLASSES), options), (1 - strength) / options)
    for label in range(len(CLASSES)):
        table[label, choice(label)] += strength
    return table


def fair_world(classes: tuple[int, ...] = tuple(range(len(CLASSES))), **tables: Any) -> World:
    """All factors independent; clean images unless `severity_range` says otherwise."""
    tables.setdefault("severity_range", (0.0, 0.0))
    return World(
        classes, _tied(biased_scene, len(SCENES), 0.0), _tied(biased_texture, len(TEXTURES), 0.0), **tables
    )


def biased_world(scene_strength: float = 0.9, texture_strength: float = 0.7, **tables: Any) -> World:
    """Background and texture follow the class; quality like web pictures: soft, flat or compressed.

    A strength s means: with probability s the class's own option, otherwise any option, evenly.
    """
    tables.setdefault("classes", tuple(range(len(TRAIN_CLASSES))))
    tables.setdefault("kind_probabilities", (0.45, 0.0, 0.2, 0.35))
    tables.setdefault("severity_range", (0.0, 0.5))
    scene = _tied(biased_scene, len(SCENES), scene_strength)
    texture = _tied(biased_texture, len(TEXTURES), texture_strength)
    return World(scene_given_class=scene, texture_given_class=texture, **tables)


def outlines(f: Factors) -> tuple[np.ndarray, ...]:
    """The object's outline and its holes, in pixels: polygons (N, 2) of x and y, where (0, 0) is the image's corner."""
    turn = np.deg2rad(f.angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline, holes = SHAPES[CLASSES[f.label]]
    return tuple(points @ rotation * f.radius + (f.x, f.y) for points in (outline, *holes))


def coverage(f: Factors, size: int = SIZE) -> np.ndarray:
    """(size, size) share of each pixel that the object covers, in [0, 1], by supersampling."""
    canvas = Image.new("L", (size * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(canvas)
    for points, fill in zip(outlines(f), (255, *[0] * len(SHAPES[CLASSES[f.label]][1])), strict=True):
        draw.polygon([tuple(p) for p in (points * _SUPERSAMPLE).tolist()], fill=fill)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255


def _surface(f: Factors, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) in {0, 1}: where the darker tone of the object's texture lies, in the object's own axes."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    turn = np.deg2rad(f.angle)
    u = ((x - f.x) * np.cos(turn) + (y - f.y) * np.sin(turn)) / 13 + rng.uniform()
    v = ((y - f.y) * np.cos(turn) - (x - f.x) * np.sin(turn)) / 13 + rng.uniform()
    texture = TEXTURES[f.texture]
    if texture == "striped":
        return (np.mod(u, 1) < 0.5).astype(np.float32)
    if texture == "dotted":
        return (np.hypot(np.mod(u, 1) - 0.5, np.mod(v, 1) - 0.5) < 0.3).astype(np.float32)
    if texture == "checkered":
        return ((np.mod(u, 1) < 0.5) ^ (np.mod(v, 1) < 0.5)).astype(np.float32)
    return np.zeros((size, size), np.float32)


def stands_out(colour: np.ndarray, mean: np.ndarray) -> bool:
    """Whether an object of this colour can be seen on a background of this mean colour; both (3,) in [0, 1]."""
    return bool(np.linalg.norm(colour - mean) >= 0.5)


def _visible(colour: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Move the object's colour away from the background's mean until the outline can be seen."""
    if stands_out(colour, mean):
        return colour
    distance = float(np.linalg.norm(colour - mean))
    towards = 1.0 if mean.mean() < 0.5 else 0.0
    return colour + (towards - colour) * min(1.0, 0.5 - distance + 0.25)


def object_layer(
    f: Factors, away_from: np.ndarray, rng: np.random.Generator, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """The object of `f` alone: its surface (size, size, 3), and the share of each pixel that it covers (size, size, 1).

    Its colour keeps away from `away_from`, (3,), the mean colour of the background. All values are in [0, 1].
    """
    base = np.array(list(COLOURS.values())[f.colour], np.float32) + rng.normal(0, 0.03, 3).astype(np.float32)
    base = _visible(np.clip(base, 0, 1), away_from)
    dark = base * 0.68 if base.mean() > 0.3 else base * 0.7 + 0.25
    tone = _surface(f, size, rng)[..., None]
    return (1 - tone) * base + tone * dark, coverage(f, size)[..., None]


def blend(scene_HW3: np.ndarray, layer: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The scene with an `object_layer` on it."""
    surface, mask = layer
    return (1 - mask) * scene_HW3 + mask * surface


def to_pixels(picture: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8."""
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def render(f: Factors, rng: np.random.Generator) -> np.ndarray:
    """Picture of the given factors, uint8 (64, 64, 3); `rng` fills in what the factors leave open."""
    scene = BACKGROUNDS[SCENES[f.scene]](rng)
    picture = blend(scene, object_layer(f, scene.mean(axis=(0, 1)), rng))
    return quality.degrade(to_pixels(picture), f.kind, f.severity, rng)


def stream(seed: int, name: str, index: int) -> np.random.Generator:
    """Random numbers of one picture of the data set `name`: they depend on nothing else."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), index))


def render_many(world: World, count: int, seed: int) -> tuple[np.ndarray, list[Factors]]:
    """`count` images, uint8 (count, 64, 64, 3), and their factors. Image i depends on (seed, i) alone."""
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    factors = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        factors.append(world.draw(rng))
        images[i] = render(factors[-1], rng)
    return images, factors


if __name__ == "__main__":
    from ubgen.miniature.benchmarks import main  # which imports this module

    main()
