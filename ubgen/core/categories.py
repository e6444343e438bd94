"""Categories of a benchmark whose images are coarser than a backbone's classes, such as "bird" for ImageNet's birds.

A mapping is a JSON file, shipped as `ubgen/data/benchmarks/<benchmark>-<class list>.json` or the user's own:

    {"benchmark": "cue-conflict",       "cue-conflict", "focus" or "in9"
     "class_list": "imagenet1k",        the class list whose ids are meant
     "source": "...",
     "source_commit": "...", "licence": "...",      where it comes from others
     "images": 1280,                    released images (of IN-9, in each variant); may be missing
     "attributes": {"time": ["day", "night", "none"], "weather": [...], "locations": [...]},       only of FOCUS
     "categories": {
       "truck": {"class_ids": ["n02701002", ...],
                 "folder": "02_wheeled vehicle",    the directory of its images; the category's name if it is missing
                 "uncommon": {"time": ["night"], "weather": [...], "locations": [...]}}}}         only of FOCUS

Categories stand in the benchmark's own order. Classes are meant by id (a wnid, or "disc" in the miniature), never by
position. A class belongs to one category at most; those in none are "outside", and a prediction of one is wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.errors import UserError

_DATA = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
ATTRIBUTES = ("time", "weather", "locations")
"""What FOCUS says of the context of an image."""


@dataclass(frozen=True)
class Category:
    """One of a benchmark's categories."""

    name: str
    class_ids: tuple[str, ...]
    folder: str
    uncommon: Mapping[str, frozenset[str]]
    """Of FOCUS: for each of ATTRIBUTES, the values that are uncommon for this category. Empty for the others."""


@dataclass(frozen=True)
class LabelMapping:
    """Which class ids belong to which category."""

    benchmark: str
    class_list: str
    source: str
    licence: str
    """Empty where it does not come from others."""
    categories: tuple[Category, ...]
    attributes: Mapping[str, tuple[str, ...]]
    """Of FOCUS: every value that each of ATTRIBUTES can take. Empty for the others."""
    images: int | None = None
    """Released images, of IN-9 in each variant; None where that is not fixed."""

    @property
    def name(self) -> str:
        """As `load_mapping` knows it, if it is a shipped one."""
        return f"{self.benchmark}-{self.class_list}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)

    @property
    def class_count(self) -> int:
        """Classes in all categories together."""
        return sum(len(category.class_ids) for category in self.categories)

    def missing(self, class_ids: Sequence[str]) -> list[str]:
        """Class ids of the mapping that are not among `class_ids`."""
        known = set(class_ids)
        return [i for category in self.categories for i in category.class_ids if i not in known]

    def numbers(self, class_ids: Sequence[str]) -> np.ndarray:
        """(K,) the number of each class's category, -1 for classes outside.

        UserError when classes of the mapping are missing from `class_ids`: with a part of a category's classes, or
        without some categories, a figure would look like the benchmark's and not be comparable with it.
        """
        if missing := self.missing(class_ids):
            raise UserError(
                f"it lacks {len(missing)} of the {self.class_count} {self.class_list} classes that "
                f"{self.benchmark} needs, such as {missing[0]!r}; this benchmark takes a backbone with all of them"
            )
        number = {i: n for n, category in enumerate(self.categories) for i in category.class_ids}
        return np.array([number.get(i, -1) for i in class_ids], np.int64)


def shipped_mappings(benchmark: str = "*") -> list[str]:
    """Names that `load_mapping` knows without a file, such as "cue-conflict-imagenet1k"."""
    return sorted(path.stem for path in _DATA.glob(f"{benchmark}-*.json"))


def load_mapping(name_or_path: str | Path) -> LabelMapping:
    """A shipped mapping by name, or a JSON file. UserError for an unknown name and a file of another form."""
    name = str(name_or_path)
    path = _DATA / f"{name}.json" if name in shipped_mappings() else Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"label mapping {name!r} is neither a file nor one of {', '.join(shipped_mappings())}"
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    try:
        return _parsed(content)
    except KeyError as error:
        raise UserError(f"{path}: a label mapping needs the key {error}") from None
    except (TypeError, AttributeError):
        raise UserError(f"{path} is not a label mapping; see the form in ubgen/core/categories.py") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def mapping_for(benchmark: str, class_ids: Sequence[str]) -> LabelMapping:
    """The shipped mapping of a benchmark whose classes are all among `class_ids`.

    UserError when there is none: saying how many classes the one that comes closest misses, if it shares any.
    """
    mappings = [load_mapping(name) for name in shipped_mappings(benchmark)]
    shared = [1 - len(mapping.missing(class_ids)) / mapping.class_count for mapping in mappings]
    if not any(shared):
        lists = " or ".join(mapping.class_list for mapping in mappings)
        raise UserError(
            f"{benchmark} needs the classes of {lists}; this backbone has {len(class_ids)} others, "
            f"such as {class_ids[0]!r}"
        )
    nearest = mappings[shared.index(max(shared))]
    nearest.numbers(class_ids)
    return nearest


def _parsed(content: Mapping[str, Any]) -> LabelMapping:
    attributes = {name: tuple(values) for name, values in content.get("attributes", {}).items()}
    if attributes and set(attributes) != set(ATTRIBUTES):
        raise ValueError(f"attributes must be {', '.join(ATTRIBUTES)}")
    categories = tuple(_category(name, entry, attributes) for name, entry in content["categories"].items())
    owner: dict[str, str] = {}
    for category in categories:
        for class_id in category.class_ids:
            if owner.setdefault(class_id, category.name) != category.name:
                raise ValueError(f"class {class_id!r} is in {owner[class_id]!r} and in {category.name!r}")
    texts = {key: str(content[key]) for key in ("benchmark", "class_list", "source")}
    images = content.get("images")
    if images is not None and not (isinstance(images, int) and images > 0):
        raise ValueError(f"images must be a positive number, not {images!r}")
    licence = str(content.get("licence", ""))
    return LabelMapping(**texts, licence=licence, categories=categories, attributes=attributes, images=images)


def _category(name: str, entry: Mapping[str, Any], attributes: Mapping[str, Sequence[str]]) -> Category:
    if not entry["class_ids"] or not all(isinstance(i, str) for i in entry["class_ids"]):
        raise ValueError(f"category {name!r} needs class ids, as a list of texts")
    uncommon = {key: frozenset(entry["uncommon"][key]) for key in attributes}
    for key, values in uncommon.items():
        if unknown := values.difference(attributes[key]):
            raise ValueError(f"category {name!r}: {min(unknown)!r} is not one of the values of {key!r}")
    return Category(name, tuple(entry["class_ids"]), str(entry.get("folder", name)), uncommon)
