"""Reading a dataset: by index, in order, or the torchvision way."""

import bisect
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ubgen.dataset.card import read_classes
from ubgen.dataset.shards import ShardInfo, finished_shard, shard_files
from ubgen.errors import UserError
from ubgen.manifest import MANIFEST, read_manifest


class Sample(NamedTuple):
    """`meta` is the content of KEY.json: class id and name, prompt, identity and scores."""

    image: Image.Image
    label: int
    class_name: str
    meta: dict[str, Any]


class ShardDataset(Sequence[Sample]):
    """The samples of finished shards, in the order in which they were generated. Safe in DataLoader workers."""

    def __init__(self, path: Path, shards: Sequence[ShardInfo], classes: Sequence[dict[str, Any]]) -> None:
        self.path = path
        self.shards = list(shards)
        self.classes = list(classes)
        self._ends = list(itertools.accumulate(shard.count for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """Sample `index` (from the end if negative), or a list of samples for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, entry = self._locate(index)
        with shard.path.open("rb") as file:
            return self._read(file, entry)

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            with shard.path.open("rb") as file:
                for entry in shard.samples:
                    yield self._read(file, entry)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Key, class index and scores of every sample, without opening a tar."""
        for shard in self.shards:
            yield from shard.samples

    def _locate(self, index: int) -> tuple[ShardInfo, dict[str, Any]]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, position)
        shard = self.shards[number]
        return shard, shard.samples[position - self._ends[number] + shard.count]

    def _read(self, file: Any, entry: dict[str, Any]) -> Sample:
        label = entry["class_index"]
        image = Image.open(io.BytesIO(_bytes(file, entry["image"]))).convert("RGB")
        return Sample(image, label, self.classes[label]["name"], json.loads(_bytes(file, entry["json"])))


class LabelledImages:
    """A dataset as torchvision's look: `[i]` is (image, label), with `classes`, `targets` and transforms.

    Without `transform`, images are RGB PIL images.
    """

    def __init__(
        self,
        path: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        self._samples = open_dataset(path)
        self.transform = transform
        self.target_transform = target_transform
        self.classes = [entry["name"] for entry in self._samples.classes]
        self.targets = [entry["class_index"] for entry in self._samples.entries()]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label, *_ = self._samples[index]
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )


def open_dataset(path: str | Path, *, partial: bool = False) -> ShardDataset:
    """The finished dataset at `path`; with `partial` also one that is still being written, as far as it got.

    UserError when the directory is unfinished, holds no shards, or a shard is missing or of the wrong size.
    """
    directory = Path(path)
    expected = None
    if not partial or (directory / MANIFEST).exists():
        expected = read_manifest(directory, "synth")["dataset"]["shards"]
    shards = _finished_shards(directory, expected)
    if not shards:
        raise UserError(f"{directory} holds no finished shard (shard-000000.tar with its .json)")
    return ShardDataset(directory, shards, read_classes(directory))


def _finished_shards(directory: Path, expected: int | None) -> list[ShardInfo]:
    if expected is None:
        numbers = sorted(set(shard_files(directory).values()))
        return [info for i in numbers if (info := finished_shard(directory, i))]
    infos = [finished_shard(directory, i) for i in range(expected)]
    missing = [i for i, info in enumerate(infos) if info is None]
    if missing:
        raise UserError(
            f"{directory}: shard {missing[0]} of {expected} is missing or damaged; "
            "make the dataset again with ubgen-synth --overwrite"
        )
    return [info for info in infos if info]


def _bytes(file: Any, place: Sequence[int]) -> bytes:
    offset, size = place
    file.seek(offset)
    return file.read(size)
