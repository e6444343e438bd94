"""Background scenes of the miniature world: a colour theme and a texture each.

A scene is drawn on a square of any multiple of 64 pixels: a larger one shows more of it, at the same grain.
"""

from functools import cache
from typing import Protocol

import numpy as np

SIZE = 64


class Background(Protocol):
    """Draws a scene: (size, size, 3) in [0, 1]. `size` is a multiple of 64."""

    def __call__(self, rng: np.random.Generator, size: int = SIZE) -> np.ndarray: ...


@cache
def _rows(size: int) -> np.ndarray:
    """(size, size): the row of each pixel, where 1 is 64 pixels."""
    return np.mgrid[0:size, 0:size][0].astype(np.float32) / SIZE


@cache
def _columns(size: int) -> np.ndarray:
    return np.mgrid[0:size, 0:size][1].astype(np.float32) / SIZE


def _soft_field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth random field in about [-1, 1]: bilinear interpolation of a grid with `cells` cells in 64 pixels."""
    cells *= size // SIZE
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    at = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    low = at.astype(int)
    w = at - low
    rows = grid[low] * (1 - w)[:, None] + grid[low + 1] * w[:, None]
    return rows[:, low] * (1 - w) + rows[:, low + 1] * w


def _paint(colour: tuple[float, float, float], shade: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1]: a colour made lighter or darker by `shade`."""
    return np.clip(np.array(colour, np.float32) * (1 + shade[..., None]), 0, 1)


def _mix(t: np.ndarray, a: tuple[float, float, float], b: tuple[float, float, float]) -> np.ndarray:
    return (1 - t[..., None]) * np.array(a, np.float32) + t[..., None] * np.array(b, np.float32)


def _grass(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    x = _columns(size)
    blades = np.sin(2 * np.pi * (9 * x + 0.25 * _soft_field(rng, 5, size)) + rng.uniform(0, 6.28))
    return _paint((0.30, 0.62, 0.24), 0.10 * blades + 0.14 * _soft_field(rng, 4, size))


def _sand(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    y, x = _rows(size), _columns(size)
    dunes = np.sin(2 * np.pi * (2.5 * y + 0.8 * x + 0.35 * _soft_field(rng, 3, size)) + rng.uniform(0, 6.28))
    return _paint((0.86, 0.74, 0.50), 0.09 * dunes)


def _water(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    y = _rows(size)
    waves = np.sin(2 * np.pi * (6 * y + 0.3 * _soft_field(rng, 4, size)) + rng.uniform(0, 6.28))
    return _paint((0.20, 0.47, 0.78), 0.16 * waves)


def _brick(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    y, x = _rows(size), _columns(size)
    y = y * 5 + rng.uniform()
    x = x * 3 + rng.uniform() + 0.5 * (np.floor(y) % 2)
    mortar = (np.mod(y, 1) < 0.14) | (np.mod(x, 1) < 0.09)
    return np.where(
        mortar[..., None],
        np.array((0.62, 0.48, 0.42), np.float32),
        _paint((0.64, 0.27, 0.20), 0.12 * _soft_field(rng, 4, size)),
    )


def _night(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    y = _rows(size)
    sky = _mix(y * (SIZE / size), (0.04, 0.05, 0.16), (0.14, 0.13, 0.32))
    for _ in range(int(rng.integers(3, 7)) * (size // SIZE) ** 2):
        row, column = rng.integers(0, size - 1, 2)
        sky[row : row + 2, column : column + 2] = 0.62
    return sky


def _snow(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    return _paint((0.90, 0.93, 0.98), 0.08 * _soft_field(rng, 4, size) - 0.03)


def _sunset(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    y = _rows(size)
    t = np.clip(y * (SIZE / size) * 1.1 - 0.05 + 0.08 * _soft_field(rng, 3, size), 0, 1)
    return _mix(t, (0.45, 0.22, 0.55), (0.98, 0.62, 0.25))


def _forest(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    x = _columns(size)
    trunks = np.sin(2 * np.pi * (4 * x + 0.1 * _soft_field(rng, 4, size)) + rng.uniform(0, 6.28))
    dark = _mix(np.clip(trunks, 0, 1), (0.10, 0.27, 0.15), (0.30, 0.20, 0.12))
    return np.clip(dark * (1 + 0.15 * _soft_field(rng, 5, size))[..., None], 0, 1)


BACKGROUNDS: dict[str, Background] = {
    "grass": _grass, "sand": _sand, "water": _water, "brick": _brick,
    "night": _night, "snow": _snow, "sunset": _sunset, "forest": _forest,
}  # fmt: skip
