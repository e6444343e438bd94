"""timm's training transforms on threads.

timm's own code does the augmentation. It draws from Python's, NumPy's and PyTorch's global generators, which threads
share. So its modules are loaded a second time here, privately, and read a generator that each thread has for itself
and that is seeded from (seed, epoch, sample). The modules that others import stay as they are.
"""

import hashlib
import importlib.util
import math
import random
import threading
from collections.abc import Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ubgen.core.errors import UserError
from ubgen.loading.decode import MEAN, Draw, decode, decode_jpeg, image_size, normalised
from ubgen.loading.settings import Augmentation


class _Draws(threading.local):
    """This thread's generators, for timm's private modules."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, value: int) -> None:
        self.python = random.Random(value)
        self.numpy = np.random.Generator(np.random.SFC64(value))


_draws = _Draws()


class _Python:
    """In place of the module `random`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_draws.python, name)


class _Numpy:
    """In place of `numpy`: its `random` is this thread's, all else NumPy's."""

    random = SimpleNamespace(choice=lambda *args, **options: _draws.numpy.choice(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _private(module: str) -> ModuleType:
    """timm's module, loaded a second time, with our generators."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.loader is not None
    private = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(private)
    private.random = _Python()  # type: ignore[attr-defined]
    private.np = _Numpy()  # type: ignore[attr-defined]
    return private


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keeping no bit gives black, as Pillow did before 13, which raises."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)


def _noise(per_pixel: bool, rand_color: bool, patch_size: Sequence[int], dtype: Any, device: Any) -> Tensor:
    """`_get_pixels` of timm's erasing, which draws from PyTorch's global generator."""
    return torch.from_numpy(_draws.numpy.standard_normal(tuple(patch_size), dtype=np.float32))


_operations = _private("timm.data.auto_augment")
_operations.NAME_TO_OP.update(
    {name: posterize for name in _operations.NAME_TO_OP if name.startswith("Posterize")}
)
_erasing = _private("timm.data.random_erasing")
_erasing._get_pixels = _noise  # type: ignore[attr-defined]
_crops = _private("timm.data.transforms")


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """What a sample's random numbers come from, in an epoch."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest(), "little"
    )


class _Record:
    """In place of an image: keeps what timm's erasing would write to it."""

    erased: tuple[int, int, Tensor] | None = None

    def __setitem__(self, where: tuple[slice, slice, slice], noise: Tensor) -> None:
        self.erased = where[1].start, where[2].start, noise


# --- transforms


class TrainingTransform:
    """timm's `transforms_imagenet_train` for one encoded image; safe to share between threads.

    Random resized crop (bicubic, antialiased), flip, RandAugment, normalisation, erasing: in this order. A JPEG is
    decoded at a reduced scale where the crop is at least twice `image_size` in both directions.
    """

    def __init__(self, image_size: int, augmentation: Augmentation | None = None) -> None:
        self.size, self.settings = image_size, augmentation or Augmentation()
        self._erase = _erasing.RandomErasing(
            self.settings.erasing, mode="pixel", max_count=1, num_splits=0, device="cpu"
        )
        self._augment, self._list = self._rand_augment(), self._rand_augment()
        for operation in self._list.ops if self._list else ():
            operation.aug_fn = partial(_listed, operation.name)

    def _rand_augment(self) -> Any:
        if not self.settings.rand_augment:
            return None
        options = {
            "translate_const": int(self.size * 0.45),
            "img_mean": tuple(round(255 * value) for value in MEAN),
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            return _operations.rand_augment_transform(self.settings.rand_augment, options)
        except (AssertionError, ValueError):
            raise UserError(f"rand_augment: timm does not know {self.settings.rand_augment!r}") from None

    @property
    def names(self) -> list[str]:
        """timm's names of RandAugment's operations."""
        return [operation.name for operation in self._list.ops] if self._list is not None else []

    def __call__(self, data: bytes, seed: int) -> np.ndarray:
        """3HW float32. The same bytes and seed give the same pixels."""
        _draws.seed(seed)
        image = self._crop(data)
        if _draws.python.random() < self.settings.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._augment is not None:
            image = self._augment(image)
        pixels = normalised(image)
        self._erase(torch.from_numpy(pixels))
        return pixels

    def draw(self, size: tuple[int, int], seed: int) -> Draw:
        """What `__call__` draws for an image of this height and width."""
        _draws.seed(seed)
        box = self.box(*size)
        flip = _draws.python.random() < self.settings.flip
        operations = self._list(()) if self._list is not None else ()
        record = _Record()
        self._erase._erase(record, 3, self.size, self.size, torch.float32)
        return Draw(box, (self.size, self.size), flip, operations, record.erased)

    def _crop(self, data: bytes) -> Image.Image:
        full = image_size(data)
        pixels = decode(data) if full is None else None
        full = full or pixels.shape[:2]  # type: ignore[union-attr]
        top, left, height, width = self.box(*full)
        if pixels is None:
            # scaled down so far, the crop still has `size` pixels each way
            pixels = decode_jpeg(data, full, math.ceil(self.size * min(full) / max(1, min(height, width))))
        if pixels.shape[:2] == full:
            return Image.fromarray(resized(pixels[top : top + height, left : left + width], self.size))
        y, x = pixels.shape[0] / full[0], pixels.shape[1] / full[1]
        box = (
            left * x,
            top * y,
            min((left + width) * x, pixels.shape[1]),
            min((top + height) * y, pixels.shape[0]),
        )
        return Image.fromarray(pixels).resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """A random crop: top, left, height, width."""
        frame = torch.empty(3, height, width, device="meta")
        settings = self.settings
        return _crops.RandomResizedCropAndInterpolation.get_params(
            frame, settings.crop_area, settings.crop_aspect
        )


def resized(pixels_HW3: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) uint8, bicubic, antialiased: four times as fast as Pillow; within 2 levels, on noise more."""
    image = torch.from_numpy(np.require(pixels_HW3, requirements=("C", "W"))).permute(2, 0, 1)[None]
    found = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).contiguous().numpy()


def _listed(name: str, before: tuple[tuple[str, float], ...], *arguments: float, **_: Any) -> Any:
    """In place of an operation on an image: the list of operations, with this one."""
    return (*before, (name, float(arguments[0]) if arguments else 0.0))
