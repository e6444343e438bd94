"""Transfer datasets, found and split. What is wrong with any of them is said before any work.

Two kinds of splits. "toolbox": as the trex toolbox does, 20 % of each class of train+val, drawn for each seed. "paper":
Table 7's sizes; the validation images are the released ones, or are drawn for each seed. Both have the same test
images; EuroSAT, which was released without a split, is divided by one fixed seed. Validation images only serve to
choose C: the final probe is fitted to train+val.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from ubgen.core.errors import UserError, first_line, install_extra, warn
from ubgen.evaluate.catalogue import DATASETS, Sizes, TransferDataset
from ubgen.evaluate.readers import Parts, image_folder
from ubgen.loading.imageset import ImageSet, Strings
from ubgen.measures.splits import apportion, draw_per_class, stratified_validation

Splits = Literal["toolbox", "paper"]
VALIDATION_SHARE = 0.2
TEST_SEED = 22
"""Of the test images that are drawn: the same in every run, so that figures of different runs can be compared."""


@dataclass(frozen=True, eq=False)
class TransferData:
    """A dataset that is ready to be evaluated on."""

    name: str
    trainval: ImageSet
    test: ImageSet
    released: np.ndarray | None = None
    """Sorted indices into `trainval` of the validation images, where they do not depend on the seed."""
    drawn: np.ndarray | None = None
    """(K,) validation images of each class, where the split fixes their numbers."""

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices into `trainval` for the search of C: to fit the probe, and to validate it."""
        labels = self.trainval.labels
        if self.released is not None:
            validation = self.released
        elif self.drawn is not None:
            validation = draw_per_class(labels, self.drawn, seed)
        else:
            validation = stratified_validation(labels, VALIDATION_SHARE, seed)
        return np.setdiff1d(np.arange(len(labels)), validation), validation

    def fingerprint(self) -> str:
        """ "sha256:<hex>" of classes, labels, file names and the rule of the split. Images are not read."""
        rule = [None if part is None else part.tolist() for part in (self.released, self.drawn)]
        parts = json.dumps([self.trainval.fingerprint(), self.test.fingerprint(), rule])
        return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"

    def file_lists(self, seeds: Sequence[int] = ()) -> dict[str, list[str]]:
        """Names of images, to be stored with the result: "trainval", "test", and "val, seed <n>" for each seed."""
        names = [self.trainval.keys[i] for i in range(len(self.trainval))]
        lists = {"trainval": names, "test": [self.test.keys[i] for i in range(len(self.test))]}
        for seed in seeds:
            lists[f"val, seed {seed}"] = [names[i] for i in self.split(seed)[1]]
        return lists


def require_datasets(names: Sequence[str], root: Path, *, download: bool = False) -> None:
    """UserError with a line for each dataset that is not there: what is missing, the layout, where to get it."""
    _refuse([problem for name in names if (problem := _missing(name, root, download))], names, root)


def open_datasets(
    names: Sequence[str], root: Path, *, splits: Splits = "toolbox", download: bool = False
) -> dict[str, TransferData]:
    """All of them: their lists are read, and their images are looked for.

    UserError with a line for each dataset that is missing or damaged.
    """
    require_datasets(names, root, download=download)
    opened, wrong = {}, []
    for name in names:
        try:
            opened[name] = open_transfer(name, root, splits=splits, download=download)
        except UserError as error:
            wrong.append(str(error))
    _refuse(wrong, names, root)
    return opened


def open_transfer(
    name: str, root: Path, *, splits: Splits = "toolbox", download: bool = False
) -> TransferData:
    """A dataset of the catalogue, or the image folder `root`/`name`.

    Where the sizes of a known dataset are not the released ones, UserError with `splits` "paper" and a warning with
    "toolbox". UserError when the dataset is missing or damaged, or a class has no training or no test image.
    """
    if splits not in ("toolbox", "paper"):
        raise UserError(f"--splits must be toolbox or paper, not {splits!r}")
    root = Path(os.path.abspath(root))  # torchvision writes the paths below "." in two ways
    require_datasets([name], root, download=download)
    known = DATASETS.get(name)
    if known is None:
        found = _divided(name, image_folder(root / name), splits, None)
    else:
        found = _divided(name, _read(name, known, root, download), splits, known)
    for part, images in (("training", found.trainval), ("test", found.test)):
        if (empty := np.flatnonzero(images.counts() == 0)).size:
            raise UserError(
                f"{name}: class {images.class_ids[empty[0]]!r} has no {part} image below {images.store}"
            )
    if known is not None:
        _check_sizes(known, found, root, splits)
    return found


def _refuse(wrong: Sequence[str], names: Sequence[str], root: Path) -> None:
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise UserError(f"{len(wrong)} of {len(names)} datasets below {root} cannot be used:{lines}")


def _missing(name: str, root: Path, download: bool) -> str:
    """What is not there, in one line; empty if everything is."""
    known = DATASETS.get(name)
    if known is None:
        return _missing_folder(name, root)
    if known.package and find_spec(known.package) is None:
        return f"{name}: its files cannot be read without {known.package}; {install_extra('eval')}"
    if (download and known.downloads) or (known.elsewhere and known.elsewhere.is_dir()):
        return ""
    base = root / known.base
    absent = [path for path in (base, *(base / file for file in known.files)) if not path.exists()]
    return f"{name}: {absent[0]} is missing; {_expected(known)}" if absent else ""


def _missing_folder(name: str, root: Path) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        return f"{name!r} is not a dataset; choose from {', '.join(DATASETS)}, and directories below {root}"
    for part in ("train", "test"):
        if not (root / name / part).is_dir():
            return (
                f"{name}: {root / name / part} is missing; expected an image folder, {name}/train/<class>/ and "
                f"{name}/test/<class>/, since this is none of {', '.join(DATASETS)}"
            )
    return ""


def _expected(known: TransferDataset) -> str:
    files = f" with {', '.join(known.files)}" if known.files else ""
    download = ", or use --download" if known.downloads else ", --download cannot"
    return f"expected {known.base}/{files}; get it from {known.source}{download}"


def _read(name: str, known: TransferDataset, root: Path, download: bool) -> Parts:
    try:
        return known.read(root, download and known.downloads)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # of torchvision, scipy, json and the file system, of many kinds
        wrong = (
            "could not be downloaded, or is damaged" if download else "is damaged, or not what was released"
        )
        raise UserError(
            f"{name}: {root / known.base} {wrong} "
            f"({type(error).__name__}: {first_line(error)}); {_expected(known)}"
        ) from error


def _divided(name: str, parts: Parts, splits: Splits, known: TransferDataset | None) -> TransferData:
    if known is not None and known.test_per_class is not None:
        parts = _with_test(parts["all"], known.test_per_class)
    if "trainval" not in parts:
        train = parts["train"]
        trainval = _together(train, parts["val"])
        released = np.arange(len(train), len(trainval)) if splits == "paper" else None
        return TransferData(name, trainval, parts["test"], released)
    drawn = _validation_counts(known, parts["trainval"].labels) if known and splits == "paper" else None
    return TransferData(name, parts["trainval"], parts["test"], drawn=drawn)


def _validation_counts(known: TransferDataset, labels: np.ndarray) -> np.ndarray | None:
    if known.validation == "proportional":
        return apportion(labels, known.sizes.val)
    return np.array(known.validation) if isinstance(known.validation, int) else None


def _with_test(images: ImageSet, per_class: int) -> Parts:
    test = draw_per_class(images.labels, per_class, TEST_SEED)
    rest = np.setdiff1d(np.arange(len(images)), test)
    return {"trainval": _chosen(images, rest), "test": _chosen(images, test)}


def _chosen(images: ImageSet, indices: np.ndarray) -> ImageSet:
    places = images.places[indices] if len(images.places) else images.places
    keys = Strings(images.keys[i] for i in indices)
    return replace(images, labels=images.labels[indices], keys=keys, places=places)


def _together(train: ImageSet, val: ImageSet) -> ImageSet:
    """Of two sets of files below one directory, with the same classes."""
    labels = np.concatenate([train.labels, val.labels])
    return replace(train, labels=labels, keys=Strings.joined([train.keys, val.keys]))


def _check_sizes(known: TransferDataset, found: TransferData, root: Path, splits: Splits) -> None:
    train, val = (len(part) for part in found.split(0))
    sizes, wanted = Sizes(train, val, len(found.test)), known.sizes
    of_paper = sizes == wanted
    of_release = (train + val, sizes.test) == (wanted.train + wanted.val, wanted.test)
    if (of_paper if splits == "paper" else of_release) and len(found.trainval.class_ids) == known.classes:
        return
    classes = len(found.trainval.class_ids)
    said = (
        f"{found.name}: {root / known.base} has {classes} classes and {_written(sizes)} images for training, "
        f"validation and test; released are {known.classes} and {_written(wanted)}"
    )
    if splits == "paper":
        raise UserError(f"{said}; --splits toolbox takes what is there")
    warn(said)


def _written(sizes: Sizes) -> str:
    return " / ".join(f"{size:,}" for size in sizes)
