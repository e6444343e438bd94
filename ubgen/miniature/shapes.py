"""Outlines of the object classes, as polygons in the square [-1, 1] x [-1, 1] (y points down)."""

import math
from collections.abc import Callable

import numpy as np

Outline = np.ndarray  # (N, 2) float


def _polygon(*points: tuple[float, float]) -> Outline:
    return np.array(points, dtype=np.float64)


def _radial(radius: Callable[[float], float], n: int = 96) -> Outline:
    """Closed curve r(angle); angle 0 points up."""
    angles = np.arange(n) * (2 * math.pi / n)
    r = np.array([radius(a) for a in angles])
    return np.stack([r * np.sin(angles), -r * np.cos(angles)], axis=1)


def _regular(corners: int) -> Outline:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star(points: int, inner: float) -> Outline:
    angles = np.arange(2 * points) * (math.pi / points)
    r = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([r * np.sin(angles), -r * np.cos(angles)], axis=1)


def _heart() -> Outline:
    t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2.5) / 15.5], axis=1)


def _crescent() -> Outline:
    outer = np.linspace(math.radians(40), math.radians(320), 64)
    inner = np.linspace(math.radians(295), math.radians(65), 48)
    far = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    near = np.stack([0.42 + 0.82 * np.cos(inner), 0.82 * np.sin(inner)], axis=1)
    return np.concatenate([far, near]) + np.array([0.15, 0.0])


def _drop() -> Outline:
    t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    return np.stack([0.72 * np.sin(t) * np.sin(t / 2) ** 1.6 * 1.15, -np.cos(t)], axis=1)


def _leaf() -> Outline:
    t = np.linspace(0, 1, 40)
    edge = np.stack([0.5 * np.sin(math.pi * t), 2 * t - 1], axis=1)
    return np.concatenate([edge, edge[::-1] * np.array([-1, 1])])


def _fish() -> Outline:
    t = np.linspace(math.radians(20), math.radians(340), 60)
    body = np.stack([-0.25 + 0.75 * np.cos(t), 0.55 * np.sin(t)], axis=1)
    return np.concatenate([body, _polygon((1.0, -0.6), (0.8, 0.0), (1.0, 0.6))])


# Each class: (outline, holes). The first ten train the generator, the others stay novel for transfer tests.
SHAPES: dict[str, tuple[Outline, tuple[Outline, ...]]] = {
    "disc": (0.92 * _radial(lambda a: 1.0), ()),
    "square": (_polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)), ()),
    "triangle": (_polygon((0, -1), (1.0, 0.8), (-1.0, 0.8)), ()),
    "star": (1.1 * _star(5, 0.42), ()),
    "heart": (1.05 * _heart(), ()),
    "cross": (
        _polygon(
            (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
            (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
        ),
        (),
    ),
    "crescent": (_crescent(), ()),
    "arrow": (
        _polygon((1, 0), (0.1, -0.85), (0.1, -0.32), (-1, -0.32), (-1, 0.32), (0.1, 0.32), (0.1, 0.85)),
        (),
    ),
    "ring": (_radial(lambda a: 1.0), (0.52 * _radial(lambda a: 1.0),)),
    "flower": (_radial(lambda a: 0.70 - 0.34 * math.cos(4 * a)), ()),
    "hexagon": (_regular(6), ()),
    "drop": (_drop(), ()),
    "bolt": (
        _polygon((0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25), (0.6, -1)),
        (),
    ),
    "house": (_polygon((0, -1), (1, -0.15), (0.75, -0.15), (0.75, 0.9), (-0.75, 0.9), (-0.75, -0.15), (-1, -0.15)), ()),
    "pine": (
        _polygon(
            (0, -1), (0.5, -0.35), (0.28, -0.35), (0.72, 0.15), (0.45, 0.15), (0.9, 0.65), (0.18, 0.65),
            (0.18, 1), (-0.18, 1), (-0.18, 0.65), (-0.9, 0.65), (-0.45, 0.15), (-0.72, 0.15), (-0.28, -0.35),
            (-0.5, -0.35),
        ),
        (),
    ),
    "fish": (_fish(), ()),
    "key": (
        _polygon(
            (-1, -0.45), (-0.2, -0.45), (-0.2, -0.15), (1, -0.15), (1, 0.55), (0.75, 0.55), (0.75, 0.15),
            (0.5, 0.15), (0.5, 0.45), (0.25, 0.45), (0.25, 0.15), (-0.2, 0.15), (-0.2, 0.45), (-1, 0.45),
        ),
        (_polygon((-0.75, -0.2), (-0.45, -0.2), (-0.45, 0.2), (-0.75, 0.2)),),
    ),
    "bottle": (
        _polygon(
            (-0.2, -1), (0.2, -1), (0.2, -0.4), (0.5, -0.05), (0.5, 1), (-0.5, 1), (-0.5, -0.05), (-0.2, -0.4)
        ),
        (),
    ),
    "leaf": (_leaf(), ()),
    "gear": (_radial(lambda a: 1.0 if math.cos(8 * a) > 0 else 0.72, n=192), (0.35 * _radial(lambda a: 1.0),)),
}  # fmt: skip

CLASSES: tuple[str, ...] = tuple(SHAPES)
TRAIN_CLASSES: tuple[str, ...] = CLASSES[:10]
NOVEL_CLASSES: tuple[str, ...] = CLASSES[10:]
