"""From an encoded image to a normalised array: decoding, and the evaluation transform."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from torch import Tensor

from ubgen.core.errors import UserError, first_line
from ubgen.loading.settings import CROP_RATIO

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_LARGEST = 178_956_970  # pixels; beyond it Pillow, too, takes an image for a decompression bomb
_EXIF_WITHIN = 1 << 16
_ORIENTATION = 0x0112


class BrokenSample(UserError):
    """An image that cannot be used; the message names it."""


def decode(data: bytes, shrink_to: int = 0, *, strict: bool = True) -> np.ndarray:
    """HW3 uint8 of an encoded image, upright: an orientation in EXIF is applied.

    Grey, palette and CMYK images become RGB; 16-bit greys are scaled to 8 bits; transparency is dropped, as by
    `Image.convert`. With `shrink_to`, a JPEG may come at a half, a quarter or an eighth of its size, with its shorter
    side still at least that long. Exceptions of many kinds for what is not a whole image; without `strict`, a JPEG that
    ends early, or has other faults that libjpeg can bridge, is taken as far as it goes.
    """
    if (size := image_size(data)) is None:
        return _decode_by_pillow(data)
    return decode_jpeg(data, size, shrink_to, strict=strict)


def decode_jpeg(data: bytes, size: tuple[int, int], shrink_to: int = 0, *, strict: bool = True) -> np.ndarray:
    """`decode`, where `image_size` gave `size`."""
    height, width = size
    scale = _scale(height, width, shrink_to)
    smallest = {"min_height": -(-height // scale), "min_width": -(-width // scale), "min_factor": scale}
    return simplejpeg.decode_jpeg(data, "RGB", **smallest, strict=strict)


def image_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that simplejpeg decodes, from its header; None for any other image."""
    if data[:2] != b"\xff\xd8":
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _require_sensible(height, width)
    return (height, width) if colours in ("YCbCr", "Gray", "RGB") and _is_upright(data) else None


def _is_upright(data: bytes) -> bool:
    if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return True
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(_ORIENTATION, 1) == 1


def _scale(height: int, width: int, shrink_to: int) -> int:
    """1, 2, 4 or 8: what libjpeg divides by cheaply."""
    if not shrink_to:
        return 1
    return max(s for s in (1, 2, 4, 8) if s == 1 or min(height, width) >= s * shrink_to)


def _decode_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        _require_sensible(image.height, image.width)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            grey = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if upright.mode in ("I", "F"):
            raise ValueError(f"its pixels are 32-bit numbers (mode {upright.mode}), which have no range")
        return np.asarray(upright.convert("RGB"))


def _require_sensible(height: int, width: int) -> None:
    if height * width > _LARGEST:
        raise ValueError(f"{width}x{height} pixels are more than is sensible")


class Draw(NamedTuple):
    """What is random of one sample, for another engine to carry out."""

    box: tuple[int, int, int, int]
    """The crop: top, left, height, width."""
    resized: tuple[int, int]
    """Height and width to which it is resized; then the middle is cut out."""
    flip: bool = False
    operations: tuple[tuple[str, float], ...] = ()
    """Of RandAugment: timm's names, and their first arguments (0 for those without)."""
    erased: tuple[int, int, Tensor] | None = None
    """Top, left, and the noise (3hw) that replaces the pixels there."""


@dataclass(frozen=True)
class EvaluationTransform:
    """timm's `transforms_imagenet_eval`: the shorter side to size / crop_ratio, centre crop, normalisation.

    Equal settings are equal transforms, with the same `repr`.
    """

    size: int
    crop_ratio: float = CROP_RATIO
    mean: tuple[float, float, float] = MEAN
    """Of values in [0, 1]."""
    std: tuple[float, float, float] = STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    strict: bool = True
    """Whether a JPEG that ends early is refused, as in `decode`; DALI does not know this."""

    def __call__(self, data: bytes, seed: int = 0) -> np.ndarray:
        """3HW float32; nothing is random."""
        image = Image.fromarray(decode(data, strict=self.strict))
        width, height = image.size
        image = image.resize(self._resized(height, width)[::-1], Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.size) / 2) for side in image.size)
        crop = image.crop((left, top, left + self.size, top + self.size))
        return normalised(crop, self.mean, self.std)

    def draw(self, size: tuple[int, int], seed: int = 0) -> Draw:
        """The whole image, resized."""
        return Draw((0, 0, *size), self._resized(*size))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """As torchvision rounds: the longer side is cut to whole pixels."""
        shorter = math.floor(self.size / self.crop_ratio)
        if width <= height:
            return int(shorter * height / width), shorter
        return shorter, int(shorter * width / height)


def normalised(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """3HW float32: (value / 255 - mean) / standard deviation, for each channel."""
    shift, factor = np.array(mean, np.float32) * 255, 1 / (np.array(std, np.float32) * 255)
    pixels = np.asarray(image)
    found = np.empty((3, *pixels.shape[:2]), np.float32)
    for c in range(3):  # several times faster than all channels at once
        np.subtract(pixels[..., c], shift[c], out=found[c], dtype=np.float32)
        found[c] *= factor[c]
    return found


def broken(where: str, error: BaseException) -> BrokenSample:
    """The error that names a sample."""
    return BrokenSample(f"{where}: not a usable image ({first_line(error)})")
