"""What `convert` writes: a class for each layout, which writes one part at a time."""

import importlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ubgen.core.errors import UserError, install_extra
from ubgen.core.files import Store, open_store
from ubgen.dataset.card import CARD
from ubgen.dataset.shards import ShardWriter, finished_shard, shard_name
from ubgen.dataset.stats import number
from ubgen.dataset.tars import TarSample
from ubgen.dataset.text import SCORES, plain, safe_names

_ROW_GROUP = 100  # images; what Hugging Face writes, so that a reader fetches some megabytes at a time
_OWN = {*SCORES, "class_index", "flag"}


class Sample(NamedTuple):
    """`position` is the number in the dataset; `rejected` are ledger entries that go with the sample's shard."""

    position: int
    tar: TarSample
    rejected: Iterable[Mapping[str, Any]] = ()


class Part(NamedTuple):
    """A file that is there once the part is whole."""

    name: str
    bytes: int


class Layout(ABC):
    """`parts` parts in `store`."""

    title: str
    pattern = ""
    """Of the data files, for Hugging Face; empty where it finds them itself."""
    reading: str

    def __init__(self, store: Store, classes: Sequence[Mapping[str, Any]], parts: int) -> None:
        self.store, self.classes, self.parts = store, classes, parts

    @abstractmethod
    def write(self, number: int, samples: Iterator[Sample]) -> Part:
        """Write part `number`; whatever was left of it by an earlier call is replaced."""

    def is_whole(self, number: int, part: Mapping[str, Any]) -> bool:
        return self.store.size(part["name"]) == part["bytes"]

    def finish(self, source_card: str | None, images: int) -> None:
        self.store.write(CARD, self._card(source_card or "", images))

    def _card(self, source: str, images: int) -> str:
        """The source's card with other words on reading, or a short one if the source has none of ours."""
        head, found, _ = source.partition("## Reading it")
        if not found:
            head = f"""---
task_categories:
- image-classification
tags:
- webdataset
configs:
- config_name: default
  data_files:
  - split: train
    path: "shard-*.tar"
---

# Converted WebDataset

{images} images of {len(self.classes)} classes.

"""
        if self.pattern:
            head = head.replace('path: "shard-*.tar"', f'path: "{self.pattern}"')
        else:
            head = re.sub(r"^configs:\n(?:(?:- |  ).*\n)+", "", head, flags=re.MULTILINE)
        return f"{head.replace('- webdataset', f'- {self.title}', 1)}## Reading it\n\n{self.reading}\n"


class Folder(Layout):
    """CLASS/KEY.jpg, metadata.jsonl and classes.json, as torchvision's ImageFolder and Hugging Face's imagefolder."""

    title = "imagefolder"
    reading = """One directory for each class; `metadata.jsonl` holds label, prompt, identity and scores of every image.

```python
from torchvision.datasets import ImageFolder

for image, label in ImageFolder("."):
    ...
```"""

    def __init__(self, store: Store, classes: Sequence[Mapping[str, Any]], parts: int) -> None:
        super().__init__(store, classes, parts)
        self.names = directory_names([entry["id"] for entry in classes])
        self._directories = {name: open_store(store.address(name)) for name in self.names}
        for directory in self._directories.values():
            if directory.local_path:
                # also for a class without images: the labels of those after it depend on it
                directory.local_path.mkdir(exist_ok=True)

    def write(self, number: int, samples: Iterator[Sample]) -> Part:
        lines = [self._write_image(sample) for sample in samples]
        os.sync()  # the images before the file that says they are there
        text = "".join(lines).encode()
        self.store.write(self._part(number), text)
        return Part(self._part(number), len(text))

    def finish(self, source_card: str | None, images: int) -> None:
        with self.store.new_file("metadata.jsonl") as file:
            for number in range(self.parts):
                file.write(self.store.read(self._part(number)))
        super().finish(source_card, images)
        for number in range(self.parts):
            self.store.delete(self._part(number))

    def _part(self, number: int) -> str:
        """A file: torchvision takes every directory for a class."""
        return f".part-{number:06d}.jsonl"

    def _write_image(self, sample: Sample) -> str:
        """Its line of metadata.jsonl."""
        name = f"{sample.position:09d}.{sample.tar.extension}"
        directory = self._directories[self.names[sample.tar.label]]
        if directory.local_path:
            # flushing each of a million files to disk by itself would take hours
            (directory.local_path / name).write_bytes(sample.tar.image)
        else:
            directory.write(name, sample.tar.image)
        meta = sample.tar.meta
        about = {"file_name": f"{self.names[sample.tar.label]}/{name}", "label": sample.tar.label}
        more = {"prompt": _prompt(meta), **_scores(meta), "meta": json.dumps(meta, sort_keys=True)}
        return json.dumps({**about, **more}) + "\n"


class Parquet(Layout):
    """train-00000-of-00012.parquet, ..., which Hugging Face `datasets` opens with an Image and a ClassLabel."""

    title = "parquet"
    pattern = "train-*.parquet"
    reading = """`train-*.parquet` hold image, label (with the names), key, prompt, scores, and the rest as JSON.

```python
from datasets import load_dataset

for sample in load_dataset(".", split="train", streaming=True):
    image, label = sample["image"], sample["label"]
```"""

    def write(self, number: int, samples: Iterator[Sample]) -> Part:
        pa, pq = _pyarrow()
        schema = self._schema(pa)
        name = f"train-{number:05d}-of-{self.parts:05d}.parquet"
        columns = ["label", "prompt"]  # whose values repeat
        with (
            self.store.new_file(name) as file,
            pq.ParquetWriter(file, schema, use_dictionary=columns, write_page_index=True) as writer,
        ):
            for rows in _batches(samples, _ROW_GROUP):
                writer.write_table(pa.Table.from_pylist([self._row(row) for row in rows], schema=schema))
        return Part(name, self.store.size(name) or 0)

    def _schema(self, pa: Any) -> Any:
        plain_types = {
            "key": "string",
            "prompt": "string",
            **dict.fromkeys(SCORES, "float64"),
            "meta": "string",
        }
        features: dict[str, Any] = {
            "image": {"_type": "Image"},
            "label": {"names": unique_names(self.classes), "_type": "ClassLabel"},
            **{name: {"dtype": dtype, "_type": "Value"} for name, dtype in plain_types.items()},
        }
        types = {"string": pa.string(), "float64": pa.float64()}
        fields = [
            pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            pa.field("label", pa.int64()),
            *(pa.field(name, types[dtype]) for name, dtype in plain_types.items()),
        ]
        return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})

    def _row(self, sample: Sample) -> dict[str, Any]:
        key, meta = f"{sample.position:09d}", sample.tar.meta
        return {
            "image": {"bytes": sample.tar.image, "path": f"{key}.{sample.tar.extension}"},
            "label": sample.tar.label,
            "key": key,
            "prompt": _prompt(meta),
            **_scores(meta),
            "meta": json.dumps(meta, sort_keys=True),
        }


class WebDataset(Layout):
    """shard-000000.tar with .idx and .json, ..., as ubgen-synth writes them."""

    title = "webdataset"
    pattern = "shard-*.tar"
    reading = """```python
import webdataset as wds

for image, label in wds.WebDataset("shard-000000.tar", shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls"):
    ...
```"""

    def write(self, number: int, samples: Iterator[Sample]) -> Part:
        first = next(samples)
        extension = first.tar.extension
        with ShardWriter(self.store, number, extension) as writer:
            for sample in itertools.chain([first], samples):
                if sample.tar.extension != extension:
                    raise UserError(
                        f"sample {sample.tar.key[:100]!r} is {sample.tar.extension}, those before it {extension}; "
                        "a shard holds one kind of images"
                    )
                meta = {name: value for name, value in sample.tar.meta.items() if name not in _OWN}
                flag = sample.tar.meta.get("flag")
                scores = {
                    name: value for name, value in _scores(sample.tar.meta).items() if value is not None
                }
                writer.write(sample.position, sample.tar.image, sample.tar.label, meta, scores, flag)
                for entry in sample.rejected:
                    writer.reject(entry)
        name = f"{shard_name(number)}.json"
        return Part(name, self.store.size(name) or 0)

    def is_whole(self, number: int, part: Mapping[str, Any]) -> bool:
        return super().is_whole(number, part) and finished_shard(self.store, number) is not None


def directory_names(ids: Sequence[str]) -> list[str]:
    """A directory for each class, so that readers that number directories by name number them as the labels.

    The ids where that is so (torchvision sorts by code point, timm by number), else with the index before them.
    """
    names = safe_names(ids)
    if names == sorted(names) == sorted(names, key=_natural):
        return names
    width = len(str(len(names) - 1))
    return [f"{index:0{width}d}_{name}" for index, name in enumerate(names)]


def unique_names(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Class names for a ClassLabel, which must differ: ImageNet has two cranes, which get their ids."""
    names = [plain(entry["name"], 400) for entry in classes]
    often = {name for name, count in Counter(names).items() if count > 1}
    ids = [plain(entry["id"], 400) for entry in classes]
    names = [f"{name} ({own})" if name in often else name for name, own in zip(names, ids, strict=True)]
    if len(set(names)) == len(names):
        return names
    return [f"{name} #{index}" for index, name in enumerate(names)]


def layout(to: str, store: Store, classes: Sequence[Mapping[str, Any]], parts: int) -> Layout:
    kinds: dict[str, type[Layout]] = {"folder": Folder, "parquet": Parquet, "webdataset": WebDataset}
    return kinds[to](store, classes, parts)


def _scores(meta: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: number(meta.get(name)) for name in SCORES}


def _prompt(meta: Mapping[str, Any]) -> str:
    """Lone surrogates cannot be stored."""
    return str(meta.get("prompt", "")).encode(errors="replace").decode()


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"--to parquet needs pyarrow; {install_extra('parquet')}") from None
