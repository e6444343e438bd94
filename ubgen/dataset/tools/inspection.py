"""What an image shows by itself: CleanVision's kinds of bad image, and hashes that find copies."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from ubgen.dataset.reader import reading

KINDS = ("blank", "dark", "light", "blurry", "low_information", "grey", "odd_aspect_ratio", "odd_size")
_READERS = 8
_AT_ONCE = 512


@dataclass(frozen=True)
class Look:
    """One image."""

    content: str
    """SHA-256 of the file."""
    pixels: str
    """SHA-256 of mode, size and pixels."""
    phash: int
    """64 bits, as of imagehash.phash."""
    dark: float
    """99th percentile of the brightness, 0 to 1; dark images are below 0.32."""
    light: float
    """1 - 5th percentile of the brightness; light images are below 0.05."""
    sharp: float
    """Low for blurry images, which are below 0.29."""
    information: float
    """A tenth of the entropy of the histogram in bits, at most 1; below 0.3 is little."""
    aspect: float
    """Shorter side over longer side; odd below 0.35."""
    side: float
    """Square root of the area in pixels."""
    blank: bool
    """Of one colour."""
    grey: bool
    """Stored as a grey image."""

    def kinds(self) -> list[str]:
        """Of `KINDS`, all but the odd size, which depends on the other images."""
        found = {
            "blank": self.blank,
            "dark": self.dark < 0.32,
            "light": self.light < 0.05,
            "blurry": self.sharp < 0.29,
            "low_information": self.information < 0.3,
            "grey": self.grey,
            "odd_aspect_ratio": self.aspect < 0.35,
        }
        return [name for name, is_so in found.items() if is_so]


def look(data: bytes) -> Look:
    """Measures and thresholds are those of CleanVision 0.3; "blank" is ours. Pillow's errors for what is no image."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    bright = _brightness(pixels)
    dark, light = np.percentile(bright, [99, 5])
    return Look(
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256(f"{image.mode} {image.size}".encode() + pixels.tobytes()).hexdigest(),
        perceptual_hash(image),
        float(dark),
        float(1 - light),
        _sharpness(image),
        min(image.entropy() / 10, 1.0),
        min(image.size) / max(image.size),
        float(np.sqrt(image.width) * np.sqrt(image.height)),
        bool((pixels == pixels[0, 0]).all()),
        image.mode == "L",
    )


def _brightness(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels / 255
    return np.sqrt(np.square(pixels.astype(np.float64)) @ (0.241, 0.691, 0.068)) / 255


def _sharpness(image: Image.Image) -> float:
    """Edges of the image at most 64 pixels long, and the spread of its histogram, which is large for flat colours."""
    ratio = max(image.size) / 64
    if ratio > 1:
        image = image.resize((max(int(image.width // ratio), 1), max(int(image.height // ratio), 1)))
    grey = image.convert("L")
    edges = float(np.sqrt(ImageStat.Stat(grey.filter(ImageFilter.FIND_EDGES)).var[0]))
    flat = 1 - np.exp(-np.std(grey.histogram()) / 100)
    return float(min(1 - np.exp(-edges / 100) + (flat if flat > 0.18 else 0), 1))


def perceptual_hash(image: Image.Image) -> int:
    """pHash: which of the 64 lowest frequencies of the 32x32 grey image are above their median (as imagehash.phash)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_cosines() @ grey @ _cosines().T, 6)  # zeros of a flat image are to be zeros
    bits = (low > np.median(low)).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


@cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the DCT-II of 32 values."""
    return np.cos(np.pi / 32 * np.arange(8)[:, None] * (np.arange(32) + 0.5))


def inspect(
    read: Callable[[int], bytes],
    chosen: Sequence[int],
    describe: Callable[[int], str],
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Look]:
    """Look at the images with the numbers `chosen`. UserError naming one that cannot be decoded."""

    def one(place: int) -> Look:
        with reading(describe(place)):
            return look(read(place))

    found: list[Look] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(chosen), _AT_ONCE):
            found += pool.map(one, chosen[start : start + _AT_ONCE])
            report(len(found), len(chosen))
    return found


def bad_images(looks: Sequence[Look]) -> dict[str, list[int]]:
    """Positions of the images of each of `KINDS`. A size is odd three interquartile ranges beyond the quartiles."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for i, one in enumerate(looks):
        for kind in one.kinds():
            found[kind].append(i)
    if looks:
        sides = np.array([one.side for one in looks])
        low, high = np.percentile(sides, [25, 75])
        reach = 3 * (high - low)
        found["odd_size"] = np.flatnonzero((sides < low - reach) | (sides > high + reach)).tolist()
    return found


def copies(values: Sequence[object]) -> list[list[int]]:
    """Groups of two or more positions with the same value, in the order of their first."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        groups[value].append(i)
    return [group for group in groups.values() if len(group) > 1]
