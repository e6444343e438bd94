"""The six transfer tasks of the miniature world: pictures of the novel classes, sorted by one factor each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ubgen.miniature import quality
from ubgen.miniature.backgrounds import BACKGROUNDS, SIZE
from ubgen.miniature.shapes import CLASSES, NOVEL_CLASSES, SHAPES
from ubgen.miniature.world import (
    COLOURS,
    SCENES,
    TEXTURES,
    Factors,
    blend,
    fair_world,
    object_layer,
    stands_out,
    to_pixels,
)

_NOVEL = tuple(CLASSES.index(name) for name in NOVEL_CLASSES)
_UPRIGHT = tuple(CLASSES.index(name) for name in ("drop", "house", "pine", "fish", "key", "bottle"))
"""Novel classes that look different in each of four quarter turns."""
_BROAD = tuple(label for label in _NOVEL if CLASSES[label] not in ("bolt", "key"))
"""Novel classes on which there is room to see a texture."""
_REACH = max(float(np.hypot(*SHAPES[name][0].T).max()) for name in NOVEL_CLASSES)
"""How far an object of radius 1 reaches from its centre."""
_SCENE_COLOURS = tuple(draw(np.random.default_rng(0)).mean(axis=(0, 1)) for draw in BACKGROUNDS.values())


def _novel(rng: np.random.Generator, classes: tuple[int, ...] = _NOVEL) -> Factors:
    """A picture of the fair world with a large object, degraded a little."""
    return fair_world(classes, severity_range=(0.0, 0.5), radius_range=(18.0, 26.0)).draw(rng)


def _by_class(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    return (_novel(rng, (_NOVEL[label],)),)


def _by_texture(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    return (replace(_novel(rng, _BROAD), texture=label),)


def _by_colour(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    """On a background from which the colour stands out, so that the renderer does not change it."""
    colour = np.array(list(COLOURS.values())[label])
    scenes = [i for i, mean in enumerate(_SCENE_COLOURS) if stands_out(colour, mean)]
    f = _novel(rng)
    small = rng.uniform(7, 12)  # a large object of this colour would make the task trivial
    return (replace(f, radius=small, colour=label, scene=int(rng.choice(scenes))),)


def _by_background(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    return (replace(_novel(rng), scene=label),)


def _by_count(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    """One to five objects of a class that do not touch. All are small, so that their area does not tell the number."""
    first = _novel(rng)
    first = replace(first, severity=first.severity / 2)
    return tuple(
        replace(
            first,
            x=x,
            y=y,
            radius=reach / _REACH,
            angle=rng.uniform(-20, 20),
            colour=int(rng.integers(len(COLOURS))),
        )
        for x, y, reach in apart(rng, label + 1, (6.0 * _REACH, 9.5 * _REACH), SIZE)
    )


def _by_rotation(label: int, rng: np.random.Generator) -> tuple[Factors, ...]:
    f = _novel(rng, _UPRIGHT)
    return (replace(f, angle=90 * label + f.angle),)


def apart(
    rng: np.random.Generator, count: int, radii: tuple[float, float], size: int
) -> list[tuple[float, float, float]]:
    """`count` circles (x, y, radius) inside a square of `size` pixels, at least 2 pixels from each other."""
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            radius = rng.uniform(*radii)
            x, y = rng.uniform(radius + 1, size - radius - 1, 2)
            if all(np.hypot(x - a, y - b) >= radius + r + 2 for a, b, r in placed):
                placed.append((float(x), float(y), float(radius)))
            if len(placed) == count:
                return placed


@dataclass(frozen=True)
class Task:
    """A transfer task. `factors(label, rng)` draws the objects of a picture; scene and quality are the first one's."""

    name: str
    classes: tuple[str, ...]
    factors: Callable[[int, np.random.Generator], tuple[Factors, ...]]
    tinted: bool = False
    """Whether pictures get a random tint, in a task that the mean colour would give away."""

    def draw(self, label: int, rng: np.random.Generator) -> np.ndarray:
        """A picture of the class, uint8 (64, 64, 3)."""
        objects = self.factors(label, rng)
        scene = BACKGROUNDS[SCENES[objects[0].scene]](rng)
        mean, shown = scene.mean(axis=(0, 1)), scene
        for f in objects:
            shown = blend(shown, object_layer(f, mean, rng))
        if self.tinted:
            shown = _tint(shown, rng)
        return quality.degrade(to_pixels(shown), objects[0].kind, objects[0].severity, rng)


def _tint(picture_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some of the colour taken away, then each channel made weaker or stronger."""
    grey = picture_HW3.mean(axis=2, keepdims=True)
    return (grey + rng.uniform(0, 1) * (picture_HW3 - grey)) * rng.uniform(0.5, 1.3, 3)


TASKS: tuple[Task, ...] = (
    Task("novel-class", NOVEL_CLASSES, _by_class),
    Task("novel-texture", TEXTURES, _by_texture),
    Task("novel-colour", tuple(COLOURS), _by_colour),
    Task("novel-background", SCENES, _by_background, tinted=True),
    Task("novel-count", ("1", "2", "3", "4", "5"), _by_count),
    Task("novel-rotation", ("000", "090", "180", "270"), _by_rotation),
)
"""Rotation in degrees, clockwise from the pose in which the generator's classes are drawn."""
