"""Accuracy of a backbone's own classifier on a validation set: ImageNet's, ImageNet-100's, or any image folder.

Layout: <root>/imagenet/val/<wnid>/, <root>/imagenet100/val/<wnid>/ or else the 100 classes out of imagenet/val, and
for any other name <root>/<name>/val/<class id>/ or <root>/<name>/<class id>/.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, warn
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.classify import How, accuracy, known_classes
from ubgen.evaluate.extract import extract
from ubgen.evaluate.results import Figure, Result
from ubgen.loading.imageset import ImageSet, listed_files, open_image_set

RELEASED = {"imagenet": 50_000, "imagenet100": 5_000}
_LISTS = {"imagenet": "imagenet1k", "imagenet100": "imagenet100"}
_TOP = 5


def open_validation(name: str, root: Path) -> ImageSet:
    """The validation set `name` below `root`, with class ids from the names of its directories. Images are not read.

    UserError when it is missing, or is one of ImageNet's with other classes. A warning for another number of images
    than was released.
    """
    where = next((d for d in (root / name / "val", root / name) if d.is_dir()), None)
    out_of_imagenet = name == "imagenet100" and where is None
    if out_of_imagenet:
        where = root / "imagenet" / "val"
    if where is None or not where.is_dir():
        or_else = " or imagenet/val/<class>/" if name == "imagenet100" else ""
        raise UserError(
            f"{root / name} is missing; expected {name}/val/<class>/{or_else} with a directory of images for each class"
        )
    found = open_image_set(where)
    if found.kind != "folders":
        raise UserError(f"{where} must hold one directory of images for each class")
    if name in _LISTS:
        found = _with_classes(found, load_classes(_LISTS[name]).ids, where, part=out_of_imagenet)
        if len(found) != RELEASED[name]:
            warn(f"{where}: {len(found):,} images of {name}; released are {RELEASED[name]:,}")
    return found


def validation(
    backbone: Backbone, data: ImageSet, name: str, *, raw: Backbone | None = None, **how: Unpack[How]
) -> Result:
    """Top-1 and top-5 accuracy, with the backbone's own transform (its input size, crop ratio and interpolation).

    Images are matched with outputs by class id. The largest of all outputs is the decision, also where `data` has only
    some of the classes. `raw`: the same network with the weights that the moving average was made of; its figures come
    after those of `backbone`. UserError when the classifier lacks classes of `data`.
    """
    figures: dict[str, Figure] = {}
    columns: dict[str, Any] = {}
    classes = np.array(data.class_ids)
    for prefix, each in (("", backbone), ("raw ", raw)):
        if each is None:
            continue
        ids = known_classes(each)
        labels = _labels(data, each)
        logits = extract(each, data, each.own_transform(), kind="logits", **how)
        rank = rank_of(logits, labels)
        figures[f"{prefix}top-1"] = accuracy(rank == 0)
        if len(ids) > _TOP:
            figures[f"{prefix}top-{_TOP}"] = accuracy(rank < _TOP)
        columns[f"{prefix}predicted"] = np.array(ids)[logits.argmax(axis=1)]
        columns[f"{prefix}correct"] = rank == 0
    return Result(
        "val",
        name,
        figures,
        {"images": len(data), "classes": len(classes), "outputs": backbone.outputs},
        {"transform": repr(backbone.own_transform())},
        {
            "sample": [data.keys[i] for i in range(len(data))],
            "label": classes[data.labels],
            **columns,
        },
    )


def rank_of(logits_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """(N,) how many outputs come before the label's; of equal ones the first comes first, as in argmax."""
    own = np.take_along_axis(logits_NK, labels_N[:, None], axis=1)
    earlier = np.arange(logits_NK.shape[1]) < labels_N[:, None]
    return ((logits_NK > own) | ((logits_NK == own) & earlier)).sum(axis=1)


def _labels(data: ImageSet, backbone: Backbone) -> np.ndarray:
    """(N,) the output that stands for each image's class."""
    place = {class_id: i for i, class_id in enumerate(known_classes(backbone))}
    missing = [class_id for class_id in data.class_ids if class_id not in place]
    if missing:
        raise UserError(
            f"backbone {backbone.name} lacks {len(missing)} of the {len(data.class_ids)} classes of {data.store}, such "
            f"as {missing[0]!r}"
        )
    return np.array([place[class_id] for class_id in data.class_ids])[data.labels]


def _with_classes(found: ImageSet, wanted: tuple[str, ...], where: Path, *, part: bool) -> ImageSet:
    """The images of the `wanted` classes, in their order. `part`: there may be others, which are left out."""
    missing = [class_id for class_id in wanted if class_id not in found.class_ids]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of {len(wanted)} classes, such as {missing[0]!r}; directories are named by "
            "class id (wnid)"
        )
    others = [class_id for class_id in found.class_ids if class_id not in wanted]
    if others and not part:
        raise UserError(f"{where}: {others[0]!r} is none of the {len(wanted)} classes")
    number = {class_id: i for i, class_id in enumerate(wanted)}
    renumbered = np.array([number.get(class_id, -1) for class_id in found.class_ids])[found.labels]
    kept = np.flatnonzero(renumbered >= 0)
    if len(kept) == len(found):
        return replace(found, class_ids=wanted, labels=renumbered.astype(np.int32))
    root = found.store.local_path
    assert root is not None  # of image folders
    return listed_files(root, wanted, renumbered[kept], (found.keys[i] for i in kept.tolist()))
