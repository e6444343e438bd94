"""Reading a dataset: by index, in order, or the torchvision way."""

import bisect
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.core.stage import MANIFEST, read_manifest
from ubgen.dataset.card import read_classes
from ubgen.dataset.shards import SampleRecord, ShardInfo, finished_shards
from ubgen.dataset.text import plain


class Sample(NamedTuple):
    """`meta` is the content of KEY.json: class id and name, prompt, identity and scores."""

    image: Image.Image
    label: int
    class_name: str
    meta: dict[str, Any]


_MOST_SHARDS = 10_000_000
_ROW = np.dtype([("label", "i4"), ("image", "i8"), ("image_size", "i8"), ("meta", "i8"), ("meta_size", "i8")])
"""A sample in memory: label, and places of image and KEY.json in the tar. Its parsed sidecar entry takes a kilobyte."""


class ShardDataset(Sequence[Sample]):
    """The samples of finished shards, in the order in which they were generated. Safe in DataLoader workers.

    Opening reads no sample; a shard's table is read when one of its samples is first asked for.
    """

    def __init__(self, store: Store, shards: Sequence[ShardInfo], classes: Sequence[dict[str, Any]]) -> None:
        self.store = store
        self.shards = list(shards)
        self.classes = list(classes)
        self._ends = list(itertools.accumulate(shard.count for shard in shards))
        self._tables: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Sample `index` (from the end if negative), or a list of samples for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = self._locate(index)
        label, image, meta = self._row(number, row)
        # one request for both: they lie side by side
        start, stop = min(image[0], meta[0]), max(image[1], meta[1])
        data = self.store.read_range(self.shards[number].tar, start, stop)
        return self._sample(label, *(data[a - start : b - start] for a, b in (image, meta)))

    def __iter__(self) -> Iterator[Sample]:
        for number, shard in enumerate(self.shards):
            with self.store.open(shard.tar) as file:
                for row in range(shard.count):
                    label, image, meta = self._row(number, row)
                    yield self._sample(label, *(_bytes(file, *place) for place in (image, meta)))

    def entries(self) -> Iterator[SampleRecord]:
        """Key, class index, scores and flag of every sample, without opening a tar; one sidecar at a time in memory."""
        for shard in self.shards:
            yield from shard.samples()

    def labels(self) -> np.ndarray:
        """(N,) int32: the class index of every sample."""
        parts = list(self.shard_labels())
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def shard_labels(self) -> Iterator[np.ndarray]:
        """(N,) int32 for each shard in turn, read when it is asked for."""
        return (self._table(number)["label"] for number in range(len(self.shards)))

    def features(self) -> np.ndarray | None:
        """(N, D) float16: the CLIP image features that synthesis kept, L2-normalised; None unless all shards have them.

        UserError for a damaged file.
        """
        parts = [shard.read_features() for shard in self.shards if shard.features is not None]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if known and len(known) == len(self.shards) else None

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The image of sample `index` as it is stored (JPEG or PNG), and its label."""
        number, row = self._locate(index)
        label, image, _ = self._row(number, row)
        return self.store.read_range(self.shards[number].tar, *image), label

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the shard among ours, and of the sample in it."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, position)
        return number, position - self._ends[number] + self.shards[number].count

    def _row(self, number: int, row: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """Label, and [start, stop) of the image and of KEY.json."""
        label, image, image_size, meta, meta_size = self._table(number)[row].item()
        return label, (image, image + image_size), (meta, meta + meta_size)

    def _table(self, number: int) -> np.ndarray:
        if number not in self._tables:
            self._tables[number] = _table(self.shards[number], len(self.classes))
        return self._tables[number]

    def _sample(self, label: int, image: bytes, meta: bytes) -> Sample:
        return Sample(_decode(image), label, self.classes[label]["name"], json.loads(meta))


def _table(shard: ShardInfo, classes: int) -> np.ndarray:
    """UserError where the sidecar points outside the tar, or names a class that classes.json does not have."""
    table = np.array([(s.class_index, *s.image, *s.json) for s in shard.samples()], _ROW)
    outside = [table[name] > shard.bytes - table[f"{name}_size"] for name in ("image", "meta")]
    if (table["label"] >= classes).any() or np.any(outside):
        raise shard.damaged()
    return table


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _bytes(file: Any, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """UserError naming `what` for the many ways in which Pillow and json fail on damaged files."""
    try:
        yield
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        SyntaxError,
        RecursionError,
    ) as error:
        reason = plain(error, 100).partition(" <_io.")[0] or type(error).__name__
        raise UserError(
            f"{what} cannot be read ({reason}); ubgen-dataset verify shows what is damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{what} is too large ({plain(error, 100)})") from error


class LabelledImages:
    """A dataset as torchvision's look: `[i]` is (image, label), with `classes`, `targets` and transforms.

    Without `transform`, images are RGB PIL images.
    """

    def __init__(
        self,
        path: str | Path | Store,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        self._samples = open_dataset(path)
        self.transform = transform
        self.target_transform = target_transform
        self.classes = [entry["name"] for entry in self._samples.classes]
        self.targets: list[int] = self._samples.labels().tolist()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        data, label = self._samples.encoded(index)
        image = _decode(data)
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )


def open_dataset(path: str | Path | Store, *, partial: bool = False) -> ShardDataset:
    """The finished dataset at `path`, a directory or URL; with `partial` also an unfinished one, as far as it got.

    UserError when the directory is unfinished, holds no shards, or a shard is missing or of the wrong size.
    """
    store = existing(path)
    expected = None if partial and store.size(MANIFEST) is None else expected_shards(store)
    shards = finished_shards(store, None if expected is None else range(expected))
    missing = next((index for index in range(expected or 0) if index not in shards), None)
    if missing is not None:
        raise UserError(
            f"{store}: shard {missing} of {expected} is missing or damaged; run ubgen-synth again to make it"
        )
    if not shards:
        raise no_shards(store)
    return ShardDataset(store, list(shards.values()), read_classes(store))


def existing(path: str | Path | Store) -> Store:
    """A directory to read from; UserError if it is a local one that does not exist. Others cannot tell."""
    store = open_store(path)
    if store.local_path is not None and not store.local_path.is_dir():
        raise UserError(f"{store}: {'not a' if store.local_path.exists() else 'no such'} directory")
    return store


def expected_shards(store: Store) -> int:
    """How many shards a finished dataset has: one of ubgen-synth, or a conversion to WebDataset shards."""
    manifest = read_manifest(store, "synth", "convert")
    about, config = (
        part if isinstance(part := manifest.get(name), dict) else {} for name in ("dataset", "config")
    )
    shards, to = about.get("shards"), config.get("to")
    if manifest["stage"] == "convert" and to != "webdataset":
        raise UserError(f"{store} is a conversion to {to}; expected WebDataset shards")
    if type(shards) is not int or not 0 <= shards <= _MOST_SHARDS:
        raise UserError(f"{store.address(MANIFEST)} does not say how many shards there are")
    return shards


def no_shards(store: Store) -> UserError:
    return UserError(f"{store} holds no finished shard (shard-000000.tar with its .json)")
