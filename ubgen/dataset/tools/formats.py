"""What `convert` writes: a class for each layout, which writes one part at a time."""

import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ubgen.core.errors import UserError, warn
from ubgen.core.files import Store, open_store
from ubgen.dataset.card import CARD, loader_workers
from ubgen.dataset.shards import ShardWriter, finished_shard, number
from ubgen.dataset.text import SCORES, plain, safe_names
from ubgen.dataset.tools.tars import SourceSample

_ROW_GROUP = 100  # images; what Hugging Face writes, so that a reader fetches some megabytes at a time
_SHARDS = '"shard-*.tar"'
FIFTYONE = "fiftyone.yml"
CLASS_MAP = "class_map.txt"
_PLACE = re.compile(rb'^\{"file_name": "([^"/]*)/[^"]*", "label": (\d+),', re.MULTILINE)
OWN = {*SCORES, "class_index", "flag"}


class Layout(ABC):
    """`parts` parts in `store`."""

    title: str
    files: str
    """The data files for Hugging Face, as a YAML pattern or list of patterns."""
    reading: str

    def __init__(self, store: Store, classes: Sequence[Mapping[str, Any]], parts: int) -> None:
        self.store, self.classes, self.parts = store, classes, parts

    @abstractmethod
    def write(self, number: int, samples: Iterator[SourceSample]) -> None:
        """Write part `number`; whatever was left of it by an earlier call is replaced."""

    @abstractmethod
    def is_whole(self, number: int) -> bool:
        """Whether `write` has finished part `number`."""

    def finish(self, source_card: str | None, images: int) -> None:
        self.store.write(CARD, self._card(source_card or "", images))

    def _card(self, source: str, images: int) -> str:
        """The source's card with other words on reading, or a short one if the source has none of ours."""
        head, found, _ = source.partition("## Reading it")
        if not found or _SHARDS not in head:
            head = f"""---
task_categories:
- image-classification
tags:
- webdataset
configs:
- config_name: default
  data_files:
  - split: train
    path: {_SHARDS}
---

# Converted WebDataset

{images} images of {len(self.classes)} classes.

"""
        head = head.replace(f"path: {_SHARDS}", f"path: {self.files}")
        return f"{head.replace('- webdataset', f'- {self.title}', 1)}## Reading it\n\n{self.reading}\n"


class Folder(Layout):
    """CLASS/KEY.jpg, metadata.jsonl and classes.json, as torchvision's ImageFolder and Hugging Face's imagefolder."""

    title = "imagefolder"
    files = '["*/*", "metadata.jsonl"]'
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

    def write(self, number: int, samples: Iterator[SourceSample]) -> None:
        lines = [self._write_image(sample) for sample in samples]
        os.sync()  # the images before the file that says they are there
        self.store.write(self._part(number), "".join(lines))

    def is_whole(self, number: int) -> bool:
        return self.store.size(self._part(number)) is not None

    def finish(self, source_card: str | None, images: int) -> None:
        there: set[tuple[bytes, bytes]] = set()
        with self.store.new_file("metadata.jsonl") as file:
            for number in range(self.parts):
                lines = self.store.read(self._part(number))
                file.write(lines)
                there.update(_PLACE.findall(lines))
        if strange := [name.decode() for name, label in there if name.decode() != self.names[int(label)]]:
            raise UserError(
                f"{self.store} was begun by an earlier version of ubgen, which called a directory {strange[0]!r}; "
                "choose another OUT"
            )
        labels = {int(label) for _, label in there}
        if empty := [entry["id"] for entry in self.classes if entry["index"] not in labels]:
            self._write_class_map(empty)
        super().finish(source_card, images)
        for number in range(self.parts):
            self.store.delete(self._part(number))

    def _write_class_map(self, empty: Sequence[str]) -> None:
        """For timm, which numbers only directories with images."""
        self.store.write(CLASS_MAP, "".join(f"{name}\n" for name in self.names))
        others = f" and {len(empty) - 1} more have" if empty[1:] else " has"
        warn(
            f"class {plain(empty[0], 60)}{others} no images, so that readers of folders number the other classes "
            f"differently: ImageFolder needs allow_empty=True, timm class_map={CLASS_MAP!r}"
        )

    def _part(self, number: int) -> str:
        """A file: torchvision takes every directory for a class."""
        return f".part-{number:06d}.jsonl"

    def _write_image(self, sample: SourceSample) -> str:
        """Its line of metadata.jsonl."""
        name = f"{sample.position:09d}.{sample.extension}"
        directory = self._directories[self.names[sample.label]]
        if directory.local_path:
            # flushing each of a million files to disk by itself would take hours
            (directory.local_path / name).write_bytes(sample.image)
        else:
            directory.write(name, sample.image)
        meta = sample.meta
        about = {"file_name": f"{self.names[sample.label]}/{name}", "label": sample.label}
        more = {"prompt": _prompt(meta), **_scores(meta), "meta": json.dumps(meta, sort_keys=True)}
        return json.dumps({**about, **more}) + "\n"


class Parquet(Layout):
    """train-00000-of-00012.parquet, ..., which Hugging Face `datasets` opens with an Image and a ClassLabel."""

    title = "parquet"
    files = '"train-*.parquet"'
    reading = """`train-*.parquet` hold image, label (with the names), key, prompt, scores, and the rest as JSON.

```python
from datasets import load_dataset

for sample in load_dataset("parquet", data_files="train-*.parquet", split="train", streaming=True):
    image, label = sample["image"], sample["label"]
```"""

    def write(self, number: int, samples: Iterator[SourceSample]) -> None:
        import pyarrow as pa  # only here: the other commands need not wait for it
        import pyarrow.parquet as pq

        schema = self._schema(pa)
        columns = ["label", "prompt"]  # whose values repeat
        with (
            self.store.new_file(self._part(number)) as file,
            pq.ParquetWriter(file, schema, use_dictionary=columns, write_page_index=True) as writer,
        ):
            for rows in _batches(samples, _ROW_GROUP):
                writer.write_table(pa.Table.from_pylist([self._row(row) for row in rows], schema=schema))

    def is_whole(self, number: int) -> bool:
        """A Parquet file ends with the mark that it begins with."""
        size = self.store.size(name := self._part(number)) or 0
        return size > 0 and self.store.read_range(name, max(size - 4, 0), size) == b"PAR1"

    def finish(self, source_card: str | None, images: int) -> None:
        """With fiftyone.yml: FiftyOne's `load_from_hub` takes label and image from these columns.

        It cannot take them from WebDataset shards, whose classes have no names and whose JSON is nested.
        """
        super().finish(source_card, images)
        lines = (
            "format: ParquetFilesDataset",
            "default_media_fields:",
            "  filepath: image",
            "classification_fields:",
            "- label",
            "tags:",
            "- ubgen",
        )
        self.store.write(FIFTYONE, "".join(f"{line}\n" for line in lines))

    def _part(self, number: int) -> str:
        return f"train-{number:05d}-of-{self.parts:05d}.parquet"

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

    def _row(self, sample: SourceSample) -> dict[str, Any]:
        key, meta = f"{sample.position:09d}", sample.meta
        return {
            "image": {"bytes": sample.image, "path": f"{key}.{sample.extension}"},
            "label": sample.label,
            "key": key,
            "prompt": _prompt(meta),
            **_scores(meta),
            "meta": json.dumps(meta, sort_keys=True),
        }


class WebDataset(Layout):
    """shard-000000.tar with .idx and .json, ..., as ubgen-synth writes them."""

    title = "webdataset"
    files = _SHARDS
    reading = """```python
import webdataset as wds

for image, label in wds.WebDataset("shard-000000.tar", shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls"):
    ...
```"""

    def __init__(self, store: Store, classes: Sequence[Mapping[str, Any]], parts: int) -> None:
        super().__init__(store, classes, parts)
        self.reading = f"{self.reading}\n\n{loader_workers(parts)}"

    def write(self, number: int, samples: Iterator[SourceSample]) -> None:
        first = next(samples)
        extension = first.extension
        with ShardWriter(self.store, number, extension) as writer:
            for sample in itertools.chain([first], samples):
                if sample.extension != extension:
                    raise UserError(
                        f"sample {sample.key[:100]!r} is {sample.extension}, those before it {extension}; "
                        "a shard holds one kind of images"
                    )
                meta = {name: value for name, value in sample.meta.items() if name not in OWN}
                flag = sample.meta.get("flag")
                flag = flag if flag is None or isinstance(flag, str) else json.dumps(flag)
                scores = {name: value for name, value in _scores(sample.meta).items() if value is not None}
                writer.write(sample.position, sample.image, sample.label, meta, scores, flag)
                for entry in sample.rejected:
                    writer.reject(entry)

    def is_whole(self, number: int) -> bool:
        return finished_shard(self.store, number) is not None


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
    prompt = meta.get("prompt")
    return "" if prompt is None else str(prompt).encode(errors="replace").decode()


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _batches(samples: Iterator[SourceSample], size: int) -> Iterator[list[SourceSample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch
