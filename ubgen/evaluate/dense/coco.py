"""Images with boxes and masks in COCO's layout.

`train2017/`, `val2017/`, `annotations/instances_train2017.json`, `annotations/instances_val2017.json`.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.errors import UserError, first_line
from ubgen.core.stage import file_digest
from ubgen.loading.decode import decode


@dataclass(frozen=True)
class CocoImages:
    """One split. Labels count from 1 (0 is background for the networks), in the order of the category ids."""

    directory: Path
    file: Path
    content: Mapping[str, Any] = field(repr=False)
    """The JSON file, as it is."""
    images: tuple[Mapping[str, Any], ...] = field(repr=False)
    objects: Mapping[int, list[Mapping[str, Any]]] = field(repr=False)
    """Of each image id, the annotations that are not crowds and whose box is not empty."""
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def names(self) -> list[str]:
        return [str(image["file_name"]) for image in self.images]

    @cached_property
    def wide(self) -> np.ndarray:
        """Which images are at least as wide as high."""
        return np.array([image["width"] >= image["height"] for image in self.images], bool)

    @cached_property
    def digest(self) -> str:
        return f"sha256:{file_digest(self.file)}"

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3). UserError for a file that cannot be read, or is not of the annotated size."""
        image = self.images[index]
        path = self.directory / image["file_name"]
        pixels = read_pixels(path)
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise UserError(
                f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but {self.file} says "
                f"{image['width']} x {image['height']}"
            )
        return pixels

    def target(self, index: int) -> dict[str, np.ndarray]:
        """boxes (N, 4) float32, x and y of two corners in pixels; labels (N,) int64 from 1; masks (N, H, W) uint8."""
        image = self.images[index]
        height, width = image["height"], image["width"]
        found = self.objects.get(image["id"], [])
        boxes = np.array([_corners(each["bbox"], height, width) for each in found], np.float32).reshape(-1, 4)
        labels = np.array([self.category_ids.index(each["category_id"]) + 1 for each in found], np.int64)
        masks = np.zeros((len(found), height, width), np.uint8)
        for mask, each in zip(masks, found, strict=True):
            mask[:] = decoded_mask(each, height, width, self.file)
        return {"boxes": boxes, "labels": labels, "masks": masks}


def open_coco(root: Path, least_side: int = 32) -> tuple[CocoImages, CocoImages]:
    """Training images, without those that have no annotation or a side below `least_side`; all validation images.

    As in MMDetection: a crowd is no object in training, but keeps its image; pycocotools gets it in evaluation.
    UserError, one line, for files that are missing or damaged, and for annotations that do not fit.
    """
    training, validation = (_split(root, name) for name in ("train2017", "val2017"))
    if training.category_ids != validation.category_ids:
        raise UserError(f"{training.file} and {validation.file} have different categories")
    annotated = {each["image_id"] for each in training.content["annotations"] if _is_box(each["bbox"], 0, 0)}
    kept = tuple(
        image
        for image in training.images
        if image["id"] in annotated and min(image["height"], image["width"]) >= least_side
    )
    if not kept:
        raise UserError(f"{training.file}: no image has an annotation and sides of at least {least_side}")
    parts = {name: getattr(training, name) for name in CocoImages.__dataclass_fields__}
    return CocoImages(**(parts | {"images": kept})), validation


def _split(root: Path, name: str) -> CocoImages:
    file, directory = root / "annotations" / f"instances_{name}.json", root / name
    if missing := [
        str(path) for path, there in ((file, file.is_file()), (directory, directory.is_dir())) if not there
    ]:
        raise UserError(f"--data {root}: no {' and no '.join(missing)}; expected COCO's layout")
    content = _read(file)
    names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    _require_images(directory, file, images.values())
    objects = defaultdict(list)
    for each in content["annotations"]:
        image = images.get(each["image_id"])
        if image is None:
            raise UserError(
                f"{file}: annotation {each['id']} is of image {each['image_id']}, which is not listed"
            )
        if each["category_id"] not in names:
            raise UserError(
                f"{file}: annotation {each['id']} has category {each['category_id']}, which the file does not list"
            )
        _require_mask_size(each, image, file)
        if not each.get("iscrowd", 0) and _is_box(each["bbox"], image["height"], image["width"]):
            objects[each["image_id"]].append(each)
    ids = tuple(sorted(names))
    return CocoImages(
        directory, file, content, tuple(images.values()), dict(objects), ids, tuple(names[i] for i in ids)
    )


_WANTED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        for part, keys in _WANTED.items():
            for each in content[part]:
                if missing := [key for key in keys if key not in each]:
                    raise KeyError(f"{part} without {missing[0]}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({first_line(error)})") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a COCO file of instances ({type(error).__name__}: {error})") from None
    if not content["images"] or not content["categories"]:
        raise UserError(f"{file} lists no images or no categories")
    values: dict[str, Any] = content
    return values


def _require_images(directory: Path, file: Path, images: Any) -> None:
    there = {path.name for path in directory.iterdir()}
    missing = [image["file_name"] for image in images if image["file_name"] not in there]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{directory / str(missing[0])} is missing{more}; {file} lists it")


def _require_mask_size(each: Mapping[str, Any], image: Mapping[str, Any], file: Path) -> None:
    mask = each["segmentation"]
    if isinstance(mask, Mapping) and list(mask.get("size", ())) != [image["height"], image["width"]]:
        raise UserError(
            f"{file}: annotation {each['id']} has a mask of size {mask.get('size')}, but its image "
            f"{image['file_name']} is {[image['height'], image['width']]} (height, width)"
        )


def _corners(box: Any, height: int, width: int) -> list[float]:
    """x, y, width, height -> two corners, within the image."""
    x, y, w, h = map(float, box)
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]


def _is_box(box: Any, height: int, width: int) -> bool:
    """MMDetection's rule: at least one pixel wide and high, and partly within the image (where its size is given)."""
    if box[2] < 1 or box[3] < 1:
        return False
    x0, y0, x1, y1 = _corners(box, height, width) if height else (0, 0, 1, 1)
    return x1 > x0 and y1 > y0


def decoded_mask(each: Mapping[str, Any], height: int, width: int, file: Path) -> np.ndarray:
    """uint8 (H, W) of polygons, or of run lengths, compressed or not."""
    from pycocotools import mask as masks  # of the extra "dense"

    shape = each["segmentation"]
    try:
        if isinstance(shape, Mapping):
            runs: Any = (
                shape if isinstance(shape["counts"], str | bytes) else masks.frPyObjects(shape, height, width)
            )
        else:
            runs = masks.merge(masks.frPyObjects(shape, height, width))
        decoded: np.ndarray = masks.decode(runs)
        return decoded
    except Exception as error:  # of the C extension, of many kinds
        raise UserError(
            f"{file}: annotation {each['id']}: its mask cannot be read ({first_line(error)})"
        ) from None


def read_pixels(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image file. UserError naming it if it is missing or damaged."""
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # of PIL and simplejpeg, of many kinds
        raise UserError(f"{path} cannot be read as an image ({first_line(error)})") from None
