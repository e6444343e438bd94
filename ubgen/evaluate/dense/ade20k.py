"""Images with index masks in ADE20K's layout (ADEChallengeData2016).

`images/training/*.jpg`, `annotations/training/*.png`, likewise `validation`, and `objectInfo150.txt` with the classes.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError, first_line
from ubgen.evaluate.dense.coco import read_pixels

IGNORED = 255
_RELEASE = 150
_NAMES = "objectInfo150.txt"


@dataclass(frozen=True)
class AdeImages:
    """One split. Labels count from 0; IGNORED marks pixels that no loss or figure counts."""

    root: Path
    split: str
    names: tuple[str, ...]
    """File names without their endings."""
    endings: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """Of the file names and the masks' sizes in bytes."""
        total = hashlib.sha256()
        for name in self.names:
            total.update(f"{name} {self.mask_path(name).stat().st_size}\n".encode())
        return f"sha256:{total.hexdigest()}"

    def mask_path(self, name: str) -> Path:
        return self.root / "annotations" / self.split / f"{name}.png"

    def image_path(self, index: int) -> Path:
        return self.root / "images" / self.split / f"{self.names[index]}{self.endings[index]}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3) and uint8 (H, W). UserError for files that cannot be read or do not fit each other."""
        image, path = read_pixels(self.image_path(index)), self.mask_path(self.names[index])
        mask = _read_mask(path)
        if mask.shape != image.shape[:2]:
            raise UserError(
                f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {self.image_path(index).name} "
                f"is {image.shape[1]} x {image.shape[0]}"
            )
        largest = int(np.where(mask == IGNORED, 0, mask).max(initial=0))
        if largest > len(self.class_names):
            raise UserError(f"{path} holds label {largest}, but there are {len(self.class_names)} classes")
        # 0 is "other": it becomes 255, and the classes begin at 0
        return image, np.where(mask == IGNORED, IGNORED, mask - np.uint8(1)).astype(np.uint8)


def open_ade20k(root: Path) -> tuple[AdeImages, AdeImages]:
    """Training and validation images. UserError for what is missing."""
    names = _class_names(root / _NAMES)
    return _split(root, "training", names), _split(root, "validation", names)


def _split(root: Path, split: str, class_names: tuple[str, ...]) -> AdeImages:
    directories = [root / part / split for part in ("images", "annotations")]
    if missing := [str(path) for path in directories if not path.is_dir()]:
        raise UserError(
            f"--data {root}: no {' and no '.join(missing)}; expected the layout of ADEChallengeData2016"
        )
    images = {
        p.stem: p.suffix
        for p in sorted(directories[0].iterdir())
        if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    }
    masks = {p.stem for p in directories[1].iterdir() if p.suffix == ".png"}
    if not images:
        raise UserError(f"{directories[0]} holds no images")
    if without := sorted(images.keys() - masks):
        raise UserError(f"{directories[1] / without[0]}.png is missing; there is an image of that name")
    if without := sorted(masks - images.keys()):
        raise UserError(f"{directories[0] / without[0]}.jpg is missing; there is a mask of that name")
    return AdeImages(root, split, tuple(images), tuple(images.values()), class_names)


def _class_names(path: Path) -> tuple[str, ...]:
    """The last column of the release's table; numbers where there is none."""
    if not path.is_file():
        return tuple(str(i) for i in range(1, _RELEASE + 1))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    names = tuple(line.split("\t")[-1].strip() for line in lines)
    if not 1 <= len(names) < IGNORED:
        raise UserError(f"{path} lists {len(names)} classes; expected 1 to {IGNORED - 1}")
    return names


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # of PIL, of many kinds
        raise UserError(f"{path} cannot be read as an image ({first_line(error)})") from None
    if mode not in ("L", "P"):
        raise UserError(f"{path} is of mode {mode}; expected an index mask of 8 bits (mode L or P)")
    return pixels
