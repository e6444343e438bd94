"""Images and masks as the networks take them, with MMSegmentation's random changes."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ubgen.evaluate.dense.ade20k import IGNORED
from ubgen.evaluate.dense.settings import SegmentSettings

_TRIES = 10
_VALUES = np.arange(256, dtype=np.float32)  # of a channel


def flipped(pixels: np.ndarray, target: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Image (H, W, 3), boxes and masks, mirrored from left to right."""
    boxes = target["boxes"].copy()
    boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
    return mirrored(pixels, 1), {**target, "boxes": boxes, "masks": mirrored(target["masks"], 2)}


def mirrored(values: np.ndarray, axis: int) -> np.ndarray:
    """A copy; PyTorch makes it many times quicker than NumPy copies a view with a negative stride."""
    writable = np.require(values, requirements="W")  # what PIL gives is not; PyTorch warns of it
    return torch.from_numpy(writable).flip(axis).numpy()


def fitted_size(size: tuple[int, ...], short: float, long: float) -> tuple[int, int]:
    """The largest size of the same shape whose shorter side is at most `short` and whose longer at most `long`."""
    height, width = size
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3), bilinear without smoothing beforehand, as OpenCV does it."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    result = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0]
    return result.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W), the nearest pixel."""
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def training_crop(
    pixels: np.ndarray, mask: np.ndarray, settings: SegmentSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) and (H, W), at most `crop` high and wide: scaled, cropped, mirrored, with other colours."""
    factor = rng.uniform(*settings.scales)
    size = fitted_size(mask.shape, settings.short_side * factor, settings.long_side * factor)
    pixels, mask = resized(pixels, size), resized_mask(mask, size)
    top, left = crop_place(mask, settings.crop, rng)
    window = np.s_[top : top + settings.crop, left : left + settings.crop]
    pixels, mask = pixels[window], mask[window]
    if rng.uniform() < 0.5:
        pixels, mask = mirrored(pixels, 1), mirrored(mask, 1)
    return photometric(pixels, rng), mask


def crop_place(mask: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a square in which no class fills 75 % of what counts, if ten tries find one."""
    top = left = 0
    for _ in range(_TRIES):
        top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in mask.shape)
        counts = np.bincount(mask[top : top + side, left : left + side].ravel(), minlength=256)
        counts[IGNORED] = 0
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    return top, left


def photometric(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness by up to 32, contrast and saturation by 0.5 to 1.5, hue by up to 18 of 180, each with a chance of 1/2.

    Contrast comes before or after saturation and hue, as likely. uint8 (H, W, 3), like the input.
    """

    brightness = _linear(1.0, rng.uniform(-32, 32))
    contrast, contrast_last = _linear(rng.uniform(0.5, 1.5)), rng.uniform() < 0.5
    saturation, hue = rng.uniform(0.5, 1.5), rng.uniform(-0.1, 0.1)
    with_brightness, with_contrast, with_saturation, with_hue = rng.uniform(size=4) < 0.5
    if with_brightness:
        pixels = brightness[pixels]
    if with_contrast and not contrast_last:
        pixels = contrast[pixels]
    if with_saturation or with_hue:
        pixels = _recoloured(pixels, saturation if with_saturation else 1.0, hue if with_hue else 0.0)
    if with_contrast and contrast_last:
        pixels = contrast[pixels]
    return pixels


def _linear(factor: float, shift: float = 0.0) -> np.ndarray:
    """uint8 (256,): what becomes of each value."""
    return np.clip(_VALUES * factor + shift, 0, 255).astype(np.uint8)


def _recoloured(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """`hue` is a share of the circle."""
    turned = ((_VALUES + hue * 256) % 256).astype(np.uint8)
    tables = np.concatenate([turned, _linear(saturation), _linear(1.0)])  # of hue, saturation, value
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV")
    return np.asarray(image.point(tables.tolist()).convert("RGB"))
