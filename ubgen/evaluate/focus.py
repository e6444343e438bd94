"""FOCUS (Kattakinda and Feizi, 2022): familiar objects in common and uncommon contexts.

Layout, as released: images below <root>, and <root>/annotations.db, an SQLite database with one table `annotations`:
file_name, category, time, weather, locations (separated by commas), humans. A stored file name begins with one
character more than the path below <root>.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Unpack
from urllib.parse import quote

import numpy as np

from ubgen.core.categories import ATTRIBUTES, Category, LabelMapping
from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.classify import (
    How,
    accuracy,
    figure,
    fingerprint,
    known_classes,
    most_likely,
    warn_of_size,
)
from ubgen.evaluate.extract import extract
from ubgen.evaluate.readers import require_files
from ubgen.evaluate.results import Result
from ubgen.loading.imageset import ImageSet, listed_files
from ubgen.measures.bias import context_score

NAME = "focus"
DATABASE = "annotations.db"
_COLUMNS = ("file_name", "category", *ATTRIBUTES)


@dataclass(frozen=True, eq=False)
class Focus:
    """All annotated images; none is filtered out."""

    mapping: LabelMapping
    images: ImageSet
    """Labelled by category."""
    uncommon: np.ndarray
    """(N,) 0..3: how many of time, weather and locations are uncommon for the category."""

    def fingerprint(self) -> str:
        """Of everything but the content of the images."""
        return fingerprint(self.mapping, self.images, self.uncommon)


class _Row(NamedTuple):
    name: str
    category: Category
    uncommon: int


def open_focus(root: Path, mapping: LabelMapping) -> Focus:
    """UserError for a damaged database, values that FOCUS does not have, and images that are not there."""
    rows = [_row(values, root, mapping) for values in _annotations(root / DATABASE)]
    if not rows:
        raise UserError(f"{root / DATABASE} holds no image")
    try:
        require_files([str(root / row.name) for row in rows], root)
    except UserError as error:
        raise UserError(f"{error}; names in {DATABASE} begin with one character that is left out") from None
    warn_of_size(root, len(rows), mapping)
    labels = [mapping.names.index(row.category.name) for row in rows]
    images = listed_files(root, mapping.names, labels, [row.name for row in rows])
    return Focus(mapping, images, np.array([row.uncommon for row in rows]))


def focus(
    backbone: Backbone,
    data: Focus,
    *,
    seed: int = 0,
    **how: Unpack[How],
) -> Result:
    """CB_avg (Eq. 9, Table 3), the same over k = 1, 2, and each partition's accuracy.

    Images are resized (bilinear) to a shorter side of the backbone's input size, and cut to a square in the middle. The
    largest of all logits is the decision; it is right if its class is one of the category's. As in the released code, a
    JPEG that ends early is taken as far as it goes.
    """
    transform = replace(backbone.transform(), interpolation="bilinear", strict=False)
    how["loader"] = "threads"  # DALI refuses incomplete images
    logits = extract(backbone, data.images, transform, kind="logits", **how)
    decided = most_likely(logits, data.mapping, known_classes(backbone))
    labels = np.array(data.mapping.names)[data.images.labels]
    correct = decided["predicted"] == labels
    score = context_score(correct, data.uncommon, seed=seed)
    partitions = {f"P{k} accuracy": accuracy(correct[data.uncommon == k]) for k in range(4)}
    return Result(
        "bias",
        NAME,
        {
            "CB_avg": figure(score.cb_avg, score.cb_avg_interval),
            "CB_12": figure(score.cb_12, score.cb_12_interval),
            **partitions,
        },
        {f"P{k}": score.count[k] for k in range(4)},
        {
            "standard error": {"CB_avg": score.cb_avg_standard_error, "CB_12": score.cb_12_standard_error},
            "mapping": data.mapping.name,
            "transform": repr(transform),
        },
        {
            "sample": [data.images.keys[i] for i in range(len(data.images))],
            "label": labels,
            **decided,
            "correct": correct,
            "uncommon": data.uncommon,
        },
    )


def _annotations(path: Path) -> list[tuple[object, ...]]:
    """The rows, sorted by file name. The database is not written to."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    query = f"SELECT {', '.join(_COLUMNS)} FROM annotations ORDER BY file_name"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            return database.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{path}: {error}; expected a table annotations with {', '.join(_COLUMNS)}, and humans"
        ) from None
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole SQLite database ({error})") from None


def _row(values: tuple[object, ...], root: Path, mapping: LabelMapping) -> _Row:
    where = f"{root / DATABASE}: image {str(values[0])[:100]!r}"
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{where} has a value that is not text")
    file_name, category_name, time, weather, locations = (str(value) for value in values)
    name = PurePosixPath(file_name[1:])
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: without its first character this is no path of a file below {root}")
    category = next((c for c in mapping.categories if c.name == category_name), None)
    if category is None:
        raise UserError(f"{where}: category {category_name!r} is none of {', '.join(mapping.names)}")
    found = {
        "time": [time],
        "weather": [weather],
        "locations": [part.strip() for part in locations.split(",")],
    }
    for attribute, each in found.items():
        for value in each:
            if value not in mapping.attributes[attribute]:
                known = ", ".join(mapping.attributes[attribute])
                raise UserError(f"{where}: {attribute} {value!r} is none of {known}")
    uncommon = sum(not category.uncommon[attribute].isdisjoint(each) for attribute, each in found.items())
    return _Row(str(name), category, uncommon)
