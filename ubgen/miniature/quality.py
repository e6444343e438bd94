"""The image-quality factor: four kinds of degradation, each with a severity in [0, 1]."""

import io

import numpy as np
from PIL import Image, ImageFilter

KINDS: tuple[str, ...] = ("blur", "noise", "jpeg", "contrast")
LEVELS: tuple[str, ...] = ("excellent", "good", "fair", "poor", "bad")


def degrade(image_HW3: np.ndarray, kind: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Degrade a uint8 picture; severity 0 leaves it as it is, 1 is the worst."""
    if kind == "blur":
        return np.asarray(Image.fromarray(image_HW3).filter(ImageFilter.GaussianBlur(2.6 * severity)))
    if kind == "noise":
        noisy = image_HW3 + rng.normal(0.0, 60.0 * severity, image_HW3.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    if kind == "jpeg":
        if severity < 0.02:
            return image_HW3
        buffer = io.BytesIO()
        Image.fromarray(image_HW3).save(buffer, "JPEG", quality=round(4 + 86 * (1 - severity) ** 2))
        return np.asarray(Image.open(buffer).convert("RGB"))
    if kind == "contrast":
        grey = image_HW3.mean()
        return np.rint(grey + (image_HW3 - grey) * (1 - 0.8 * severity)).astype(np.uint8)
    raise ValueError(f"unknown degradation {kind!r}; one of {', '.join(KINDS)}")
