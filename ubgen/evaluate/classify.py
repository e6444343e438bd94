"""What a backbone's own classifier says of images, and the categories in which a benchmark puts its classes."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ubgen.core.categories import LabelMapping, mapping_for
from ubgen.core.console import Report
from ubgen.core.errors import UserError, warn
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.results import Figure
from ubgen.loading.imageset import IMAGE_ENDINGS, ImageSet
from ubgen.loading.settings import Loader
from ubgen.measures.bias import Interval, wilson

OUTSIDE = "outside"
"""A prediction in none of a benchmark's categories."""


class How(TypedDict, total=False):
    """How logits are computed: arguments of `ubgen.evaluate.extract.extract`, with its defaults."""

    cache: Path | None
    batch_size: int
    threads: int
    loader: Loader
    report: Report


def known_classes(backbone: Backbone) -> tuple[str, ...]:
    """What the backbone's logits mean. UserError where nothing says so."""
    if not backbone.outputs:
        raise UserError(
            f"backbone {backbone.name}: its weights hold no classifier, so it cannot name classes"
        )
    if backbone.class_ids is None:
        raise UserError(
            f"backbone {backbone.name}: nothing says which classes its {backbone.outputs} outputs are; name them with "
            "--classes, a class list or a file with one class id a line"
        )
    return backbone.class_ids


def mapping_of(benchmark: str, backbone: Backbone) -> LabelMapping:
    """The benchmark's mapping that fits the backbone's classes; see `mapping_for`."""
    class_ids = known_classes(backbone)
    try:
        return mapping_for(benchmark, class_ids)
    except UserError as error:
        raise UserError(f"backbone {backbone.name}: {error}") from None


def most_likely(logits_NK: np.ndarray, mapping: LabelMapping, class_ids: Sequence[str]) -> dict[str, Any]:
    """The largest of all logits, and its category: columns "predicted" (a category or "outside") and "class"."""
    numbers, first = mapping.numbers(class_ids), logits_NK.argmax(axis=1)
    names = np.array([*mapping.names, OUTSIDE])  # -1 is the last one
    return {"predicted": names[numbers[first]], "class": np.array(class_ids)[first]}


def images_in(directory: Path) -> list[str]:
    """Sorted names of the image files in a directory, without hidden ones. UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory} is missing")
    names = sorted(
        name
        for name in os.listdir(directory)
        if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")  # such as macOS's ._cat1.png
    )
    if not names:
        raise UserError(f"{directory} holds no image")
    return names


def warn_of_size(root: Path, found: int, mapping: LabelMapping) -> None:
    """Figures on a part of a benchmark are not comparable with those on all of it."""
    if mapping.images is not None and found != mapping.images:
        warn(f"{root} holds {found:,} images; released are {mapping.images:,}")


def fingerprint(mapping: LabelMapping, images: ImageSet, *columns: Sequence[str] | np.ndarray) -> str:
    """ "sha256:<hex>" of what a result depends on besides the images' content: mapping, names, labels, `columns`."""
    categories = [[category.name, *category.class_ids] for category in mapping.categories]
    parts = [categories, images.fingerprint(), *(json.dumps(np.asarray(c).tolist()) for c in columns)]
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def accuracy(correct: np.ndarray) -> Figure:
    """Percent, with Wilson's interval; undefined without an image."""
    value = 100 * float(correct.mean()) if len(correct) else None
    return figure(value, wilson(int(correct.sum()), len(correct)))


def figure(value: float | None, interval: Interval | None, unit: str = "%") -> Figure:
    low, high = interval or (None, None)
    return Figure(value, low, high, unit)
