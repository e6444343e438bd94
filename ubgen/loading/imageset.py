"""Training sets of three kinds under one description: ubgen's shards, image folders, and WebDataset tars of others.

A `ImageSet` holds arrays, not objects: 1.3 million samples take about 60 MB. Labels come from the sidecars, the
folders or the `.cls` members, never from the order in which images are read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError
from ubgen.core.files import LocalStore, Store, open_store
from ubgen.core.stage import MANIFEST
from ubgen.dataset import ShardInfo, open_dataset
from ubgen.dataset.card import CLASSES, read_classes
from ubgen.loading.tars import samples

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What `torchvision.datasets.ImageFolder` takes for an image; other files of a folder do not count."""


_AT_ONCE = 8  # tars of others that are read


class Strings:
    """Many short texts in one buffer."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self.data = b"".join(encoded)

    @classmethod
    def joined(cls, parts: Sequence["Strings"]) -> "Strings":
        whole = cls([])
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part._ends + start for part, start in zip(parts, starts, strict=False)]
        whole._ends = np.concatenate([np.empty(0, np.int64), *ends])
        whole.data = b"".join(part.data for part in parts)
        return whole

    @property
    def nbytes(self) -> int:
        return self._ends.nbytes + len(self.data)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self.data[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled, encoded images in `store`: each a part of a tar, or a file of its own."""

    store: Store
    kind: str
    """"shards", "folders" or "tars"."""
    class_ids: tuple[str, ...]
    labels: np.ndarray
    """(N,) int32, index into class_ids."""
    keys: Strings
    """A sample's name in the dataset."""
    files: Sequence[str]
    """Of tars and shards: their names. Unused for folders, where the key is the file."""
    places: np.ndarray
    """(N, 3) int64: number of the file, offset, size. Of folders only the size counts."""
    checksum: str = ""
    """Of shards: a hash of their SHA-256s."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """The encoded image of a sample. OSError where it cannot be read."""
        if self.kind == "folders":
            return self.store.read(self.keys[index])
        file, offset, size = self.places[index].tolist()
        return self.store.read_range(self.files[file], offset, offset + size)

    def describe(self, index: int) -> str:
        """A sample for people: where it lies."""
        if self.kind == "folders":
            return self.store.address(self.keys[index])
        return f"{self.store.address(self.files[int(self.places[index, 0])])}: sample {self.keys[index]}"

    def fingerprint(self) -> str:
        """ "sha256:<hex>" of classes, labels, keys, places and sizes; of shards also of their content.

        Images are not read.
        """
        total = hashlib.sha256(json.dumps([self.kind, self.class_ids, self.checksum]).encode())
        for part in (self.labels, self.places):
            total.update(np.ascontiguousarray(part).tobytes())
        total.update(self.keys.data)
        return f"sha256:{total.hexdigest()}"

    def counts(self) -> np.ndarray:
        """(K,) samples of each class."""
        return np.bincount(self.labels, minlength=len(self.class_ids))


def open_image_set(where: str | Path | Store | ImageSet, classes: str | None = None) -> ImageSet:
    """What lies at `where`, a directory or URL.

    A manifest or classes.json with shards makes it a dataset of ubgen, whose classes are those of classes.json. A
    directory with tars is a WebDataset: labels are the numbers in its `.cls` members, and class ids come from
    `classes` (a shipped list or a file, as for ubgen-synth), from a classes.json beside the tars, or are the numbers
    themselves. Anything else is an image folder: one directory for each class, labelled in the order in which
    `torchvision.datasets.ImageFolder` sorts the names, as texts: "10" comes before "2".

    UserError when it is none of these, is unfinished, or has a class without an image.
    """
    if isinstance(where, ImageSet):
        return where
    store = open_store(where)
    names = store.names()
    tars = [name for name in names if name.endswith(".tar")]
    if MANIFEST in names and any(name.startswith("shard-") for name in tars):
        found = _shards(store)
    elif tars:
        found = _tars(store, tars, classes)
    else:
        found = _folders(store)
    if not len(found):
        raise UserError(f"{store} holds no image")
    if (empty := np.flatnonzero(found.counts() == 0)).size:
        raise UserError(
            f"{store}: class {found.class_ids[empty[0]]!r} has no image ({empty.size} of {len(found.class_ids)} "
            "classes are empty); add images, or remove the class"
        )
    return found


def listed_files(
    root: Path, class_ids: Sequence[str], labels: Sequence[int] | np.ndarray, names: Iterable[str]
) -> ImageSet:
    """Image files by their names below `root`, in the order given."""
    labels = np.asarray(labels, np.int32)
    empty = np.empty((0, 3), np.int64)
    return ImageSet(LocalStore(root), "folders", tuple(class_ids), labels, Strings(names), (), empty)


def require_class_count(data: ImageSet, wanted: int | None) -> None:
    """UserError unless the dataset has the number of classes that the user expects."""
    if wanted is not None and wanted != len(data.class_ids):
        raise UserError(f"--num-classes {wanted}: {data.store} has {len(data.class_ids)} classes")


def matched(validation: ImageSet, training: ImageSet) -> ImageSet:
    """The validation set with the labels of the training set, matched by class id and not by position.

    UserError naming a class that is in one and not in the other.
    """
    position = {name: i for i, name in enumerate(training.class_ids)}
    for name in validation.class_ids:
        if name not in position:
            raise UserError(f"class {name!r} of {validation.store} is not in {training.store}")
    for name in training.class_ids:
        if name not in validation.class_ids:
            raise UserError(f"class {name!r} of {training.store} is not in {validation.store}")
    renumbered = np.array([position[name] for name in validation.class_ids], np.int32)
    return replace(validation, class_ids=training.class_ids, labels=renumbered[validation.labels])


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(N,) int64: a permutation of the whole dataset, from (seed, epoch) alone.

    Samples are sorted by numbers of Philox, whose raw stream NumPy keeps the same from version to version.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(count)
    return np.argsort(raw, kind="stable")


def rank_order(count: int, seed: int, epoch: int, rank: int, ranks: int) -> np.ndarray:
    """This rank's samples of an epoch: every `ranks`-th of `epoch_order`.

    Over all ranks each sample comes once, and the samples of the first n batches of all ranks together are the same
    for any number of ranks. Ranks differ by at most one sample.
    """
    if not 0 <= rank < ranks:
        raise UserError(f"rank must be at least 0 and below ranks ({ranks}), not {rank}")
    return epoch_order(count, seed, epoch)[rank::ranks]


class _Part(NamedTuple):
    """The samples of one tar."""

    labels: np.ndarray
    places: np.ndarray
    keys: Strings


def _joined(
    store: Store, kind: str, ids: Sequence[str], files: Sequence[str], parts: Sequence[_Part]
) -> ImageSet:
    numbers = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    places = np.column_stack([numbers, np.concatenate([part.places for part in parts])])
    if (unknown := np.flatnonzero((labels < 0) | (labels >= len(ids)))).size:
        which = files[int(numbers[unknown[0]])]
        raise UserError(
            f"{store.address(which)}: label {labels[unknown[0]]}, but there are only {len(ids)} classes"
        )
    return ImageSet(
        store, kind, tuple(ids), labels, Strings.joined([part.keys for part in parts]), files, places
    )


def _shards(store: Store) -> ImageSet:
    dataset = open_dataset(store)
    ids = [entry["id"] for entry in dataset.classes]
    parts = [_shard(shard) for shard in dataset.shards]
    found = _joined(store, "shards", ids, [shard.tar for shard in dataset.shards], parts)
    sums = "".join(shard.sha256 for shard in dataset.shards)
    return replace(found, checksum=hashlib.sha256(sums.encode()).hexdigest())


def _shard(shard: ShardInfo) -> _Part:
    """Of a sidecar only what training needs: a million `SampleRecord`s would take half a minute."""
    try:
        samples = json.loads(shard.store.read(shard.sidecar))["samples"]
        rows = np.array([(s["class_index"], *s["image"]) for s in samples], np.int64).reshape(-1, 3)
        keys = Strings([s["key"] for s in samples])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise shard.damaged() from None
    ends = rows[:, 1] + rows[:, 2]
    if len(rows) != shard.count or (rows < 0).any() or (ends > shard.bytes).any():
        raise shard.damaged()
    return _Part(rows[:, 0].astype(np.int32), rows[:, 1:], keys)


def _folders(store: Store) -> ImageSet:
    if not isinstance(store, LocalStore):
        raise UserError(
            f"{store} holds no shards and no tars; image folders are read from a local directory only"
        )
    root = store.local_path
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    names = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"{root} is not a dataset: it holds no tar and no directory of images")
    labels, sizes, parts = [], [], []
    for label, name in enumerate(names):
        files = sorted(_images_below(str(root / name), name))
        labels.append(np.full(len(files), label, np.int32))
        sizes.append(np.array([size for _, size in files], np.int64))
        parts.append(Strings(file for file, _ in files))
    return ImageSet(
        store,
        "folders",
        tuple(_ids_of_folders(store, names)),
        np.concatenate(labels),
        Strings.joined(parts),
        (),
        np.pad(np.concatenate(sizes)[:, None], ((0, 0), (2, 0))),
    )


def _ids_of_folders(store: Store, names: Sequence[str]) -> Sequence[str]:
    """The names; in a conversion of a ubgen dataset, which may have renamed classes, the ids of its classes.json."""
    if store.size(CLASSES) is None or len(entries := read_classes(store)) != len(names):
        return names
    return [entry["id"] for entry in entries]


def _images_below(directory: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Names and sizes."""
    for entry in os.scandir(directory):
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _images_below(entry.path, name)
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            yield name, entry.stat().st_size


def _tars(store: Store, names: Sequence[str], classes: str | None) -> ImageSet:
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # they wait for the disk or the network
        parts = list(pool.map(lambda name: _tar(store, name), names))
    highest = max((int(part.labels.max()) for part in parts if len(part.labels)), default=-1)
    return _joined(store, "tars", _ids_of_tars(store, classes, highest + 1), names, parts)


def _ids_of_tars(store: Store, classes: str | None, count: int) -> Sequence[str]:
    if classes is not None:
        return load_classes(classes).ids
    if store.size(CLASSES) is not None:
        return [entry["id"] for entry in read_classes(store)]
    return [str(number) for number in range(count)]


def _tar(store: Store, name: str) -> _Part:
    """Reads the tar itself; an index beside it may be wrong, and is not used."""
    with store.open(name) as file:
        found = list(samples(file, store.address(name), IMAGE_ENDINGS))
    rows = np.array([(s.offset, s.size) for s in found], np.int64).reshape(-1, 2)
    return _Part(np.array([s.label for s in found], np.int32), rows, Strings(s.key for s in found))
