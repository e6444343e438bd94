"""A dataset in another layout: image folders, Parquet, or WebDataset shards made anew.

The source is a finished ubgen dataset or any directory of WebDataset tars. The output is made in parts, and each part
shows by its own files that it is whole.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ubgen.core.errors import UserError, first_line
from ubgen.core.files import Store, open_store
from ubgen.core.stage import MANIFEST, RUN, Stage, read_manifest
from ubgen.dataset.card import CARD, CLASSES, REJECTIONS, read_classes, write_classes
from ubgen.dataset.images import shrink
from ubgen.dataset.reader import ShardDataset, existing, open_dataset
from ubgen.dataset.shards import ShardInfo
from ubgen.dataset.tools.columns import Columns
from ubgen.dataset.tools.formats import OWN, Layout, layout
from ubgen.dataset.tools.tars import SourceSample, read_samples, scan, tar_names

Format = Literal["folder", "parquet", "webdataset"]
Progress = Callable[[int, int], None]
_MOST_NAMELESS = 100_000  # classes; a wrong label must not make millions of directories


class Converted(NamedTuple):
    """`made` is False where the conversion was finished before, so that there was nothing to do."""

    images: int
    made: bool


@dataclass(frozen=True)
class Source:
    """What is converted: the tars with their numbers of samples, and the classes that the labels mean."""

    store: Store
    tars: tuple[tuple[str, int], ...]
    classes: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardInfo, ...] = ()
    """Of a ubgen dataset; their ledgers are kept."""
    extensions: frozenset[str] = frozenset()
    """Of the images."""
    columns: Columns | None = None
    """Of the samples' JSON, where that is not ours."""

    @property
    def images(self) -> int:
        return sum(count for _, count in self.tars)

    def samples(self, start: int, stop: int) -> Iterator[SourceSample]:
        """Samples `start` to `stop` in the tars' order, numbered from the first of all."""
        first = 0
        for number, (name, count) in enumerate(self.tars):
            if first < stop and first + count > start:
                yield from self._of_tar(number, name, first, max(start - first, 0), min(stop - first, count))
            first += count

    def _of_tar(self, number: int, name: str, first: int, start: int, stop: int) -> Iterator[SourceSample]:
        where = self.store.address(name)
        found = start
        for sample in itertools.islice(read_samples(self.store, name, skip=start), stop - start):
            if sample.label >= len(self.classes):
                raise UserError(
                    f"{where}: sample {sample.key!r} has class {sample.label}; "
                    f"{CLASSES} has {len(self.classes)} classes, from 0"
                )
            rejected = self.shards[number].rejected() if self.shards and found == 0 else ()
            meta = self.columns.fitted(sample.meta) if self.columns else sample.meta
            yield replace(sample, position=first + found, rejected=rejected, meta=meta)
            found += 1
        if found != stop:
            raise UserError(
                f"{where} has {found} samples, not {stop}; ubgen-dataset verify shows what is wrong"
            )


def convert(
    source: str | Path | Store,
    out: str | Path | Store,
    to: Format,
    shard_size: int | None = None,
    progress: Progress = lambda done, total: None,
    short_side: int | None = None,
) -> Converted:
    """Write `source` to `out`, a directory or URL that is made, or continued where an earlier call stopped.

    A part of the output holds `shard_size` images (default 1000). Images whose shorter side is above `short_side` are
    scaled down to it. `progress` is called with images done and their
    total. UserError for a source that is unfinished, damaged or hostile (see `read_samples`), and for an `out` that
    holds anything but this conversion.
    """
    size = 1000 if shard_size is None else shard_size
    if size < 1:
        raise UserError(f"--shard-size must be at least 1, not {size}")
    if short_side is not None and short_side < 1:
        raise UserError(f"--short-side must be at least 1, not {short_side}")
    if not str(source).strip() or not str(out).strip():
        raise UserError("DATASET and OUT must name directories, not be empty")
    read_from, write_to = existing(source), open_store(out)
    if write_to.local_path and write_to.local_path.exists() and not write_to.local_path.is_dir():
        raise UserError(f"OUT: {out} is not a directory")
    if write_to.url.rstrip("/") == read_from.url.rstrip("/"):
        raise UserError(f"{out} is the dataset itself; choose another output directory")
    origin = open_source(read_from, to)
    conversion = {"source": read_from.url, "to": to, "shard_size": size}
    if short_side is not None:
        conversion["short_side"] = short_side
    stage = Stage(
        write_to,
        "convert",
        {**conversion, "images": origin.images, "content": _fingerprint(origin)},
        config=conversion,
        overwrite=None,
    )
    with stage.hold():
        if stage.state == "finished":
            return Converted(origin.images, made=False)
        stage.begin()
        if origin.columns:
            origin.columns.tell()
        _copy_about(origin, write_to)
        made = layout(to, write_to, origin.classes, -(-origin.images // size))
        _make_parts(origin, made, size, progress, short_side)
        made.finish(_text(read_from, CARD), origin.images)
        counts = {"images": origin.images, "shards": made.parts, "classes": len(origin.classes)}
        stage.finish({}, dataset=counts)
    return Converted(origin.images, made=True)


def open_source(store: Store, to: Format) -> Source:
    """A finished ubgen dataset by its sidecars, or any directory of tars by looking through all of them."""
    columns = Columns(without=OWN) if to == "webdataset" else None
    if store.size(MANIFEST) is not None or store.size(RUN) is not None:
        source = _ours(open_dataset(store), columns)
    else:
        source = _foreign(store, columns)
    if to == "webdataset" and len(source.extensions) > 1:
        raise UserError(
            f"{store} holds .jpg and .png images, but shards are of one kind; choose --to folder or parquet"
        )
    return source


def _ours(dataset: ShardDataset, columns: Columns | None) -> Source:
    """The JSON is of others too where an earlier conversion took it over."""
    if columns and read_manifest(dataset.store)["stage"] == "convert":
        for shard in dataset.shards:
            scan(dataset.store, shard.tar, columns)
    else:
        columns = None
    tars = tuple((shard.tar, shard.count) for shard in dataset.shards)
    extensions = frozenset(shard.extension for shard in dataset.shards)
    return Source(dataset.store, tars, tuple(dataset.classes), tuple(dataset.shards), extensions, columns)


def _foreign(store: Store, columns: Columns | None) -> Source:
    tars = {name: scan(store, name, columns) for name in tar_names(store)}
    largest = max((label for tar in tars.values() for label in tar.labels), default=-1)
    if largest < 0:
        raise UserError(f"{store}: its .tar files hold no sample")
    named = store.size(CLASSES) is not None
    if not named and largest >= _MOST_NAMELESS:
        raise UserError(
            f"{store}: a sample has class {largest}; so many classes need a {CLASSES} beside the tars"
        )
    classes = read_classes(store) if named else _nameless(largest + 1)
    if largest >= len(classes):
        raise UserError(
            f"{store}: a sample has class {largest}; {CLASSES} has {len(classes)} classes, from 0"
        )
    counted = tuple((name, len(tar.labels)) for name, tar in tars.items() if tar.labels)
    extensions = frozenset[str]().union(*(tar.extensions for tar in tars.values()))
    return Source(store, counted, tuple(classes), (), extensions, columns)


def _nameless(count: int) -> list[dict[str, Any]]:
    width = len(str(count - 1))
    names = [f"{index:0{width}d}" for index in range(count)]
    return [{"index": i, "id": name, "name": f"class {i}", "prompt": ""} for i, name in enumerate(names)]


def _fingerprint(source: Source) -> str:
    """Sizes stand for the tars' content: hashing that would take as long as copying it."""
    sizes = source.store.sizes()
    content = [[name, count, sizes[name]] for name, count in source.tars]
    classes = [[entry["id"], entry["name"]] for entry in source.classes]
    return f"sha256:{hashlib.sha256(json.dumps([content, classes]).encode()).hexdigest()}"


def _copy_about(source: Source, out: Store) -> None:
    ids, names, prompts = (
        [entry.get(key, "") for entry in source.classes] for key in ("id", "name", "prompt")
    )
    write_classes(out, ids, names, prompts)
    if (ledger := _text(source.store, REJECTIONS)) is not None:
        out.write(REJECTIONS, ledger)


def _make_parts(source: Source, made: Layout, size: int, progress: Progress, short_side: int | None) -> None:
    progress(0, source.images)
    for number in range(made.parts):
        start, stop = number * size, min((number + 1) * size, source.images)
        if not made.is_whole(number):
            samples = source.samples(start, stop)
            if short_side is not None:
                samples = (_shrunk(sample, short_side) for sample in samples)
            made.write(number, _reported(samples, progress, source.images))
        progress(stop, source.images)


def _shrunk(sample: SourceSample, short_side: int) -> SourceSample:
    try:
        return replace(sample, image=shrink(sample.image, sample.extension, short_side))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"sample {sample.key!r} cannot be decoded ({first_line(error)})") from None


def _reported(samples: Iterator[SourceSample], progress: Progress, total: int) -> Iterator[SourceSample]:
    for sample in samples:
        yield sample
        if sample.position % 100 == 99:
            progress(sample.position + 1, total)


def _text(store: Store, name: str) -> str | None:
    try:
        return store.read(name).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
