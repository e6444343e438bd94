"""A dataset in another layout: image folders, Parquet, or WebDataset shards made anew.

The source is a finished ubgen dataset or any directory of WebDataset tars. The output is made in parts. `convert.json`,
written first, says what is made from what, and which parts are whole; `manifest.json`, written last, that all are.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.core.stage import MANIFEST, stage_directory
from ubgen.dataset.card import CARD, CLASSES, read_classes, write_classes
from ubgen.dataset.formats import Layout, Sample, layout
from ubgen.dataset.reader import open_dataset
from ubgen.dataset.shards import ShardInfo
from ubgen.dataset.stats import read_sidecar
from ubgen.dataset.tars import read_samples, scan_labels

Format = Literal["folder", "parquet", "webdataset"]
Progress = Callable[[int, int], None]
PLAN = "convert.json"
REJECTIONS = "rejections.jsonl"
_MOST_NAMELESS = 100_000  # classes; a wrong label must not make millions of directories


@dataclass(frozen=True)
class Source:
    """What is converted: the tars with their numbers of samples, and the classes that the labels mean."""

    store: Store
    tars: tuple[tuple[str, int], ...]
    classes: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardInfo, ...] = ()
    """Of a ubgen dataset; their ledgers are kept."""

    @property
    def images(self) -> int:
        return sum(count for _, count in self.tars)

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        """Samples `start` to `stop` in the tars' order, numbered from the first of all."""
        first = 0
        for number, (name, count) in enumerate(self.tars):
            if first < stop and first + count > start:
                yield from self._of_tar(number, name, first, max(start - first, 0), min(stop - first, count))
            first += count

    def _of_tar(self, number: int, name: str, first: int, start: int, stop: int) -> Iterator[Sample]:
        rejected = read_sidecar(self.shards[number])["rejected"] if self.shards and start == 0 else ()
        where = self.store.address(name)
        found = start
        for sample in itertools.islice(read_samples(self.store, name, skip=start), stop - start):
            if sample.label >= len(self.classes):
                raise UserError(
                    f"{where}: sample {sample.key!r} has class {sample.label}, which {CLASSES} has not"
                )
            yield Sample(first + found, sample, rejected if found == 0 else ())
            found += 1
        if found != stop:
            raise UserError(
                f"{where} has {found} samples where there were {stop}; ubgen-dataset verify says more"
            )


def convert(
    source: str | Path | Store,
    out: str | Path | Store,
    to: Format,
    shard_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Number of images in `out`, a directory or URL that is made, or continued where an earlier call stopped.

    A part of the output holds `shard_size` images (default 1000). `progress` is called with images done and their
    total. UserError for a source that is unfinished, damaged or hostile (see `read_samples`), and for an `out` that
    holds anything but this conversion.
    """
    size = 1000 if shard_size is None else shard_size
    if size < 1:
        raise UserError(f"--shard-size must be at least 1, not {size}")
    read_from, write_to = open_store(source), open_store(out)
    if write_to.url.rstrip("/") == read_from.url.rstrip("/"):
        raise UserError(f"{out} is the dataset itself; choose another output directory")
    _refuse_other_content(write_to)
    origin = open_source(read_from)
    plan = _plan(origin, to, size)
    # the later stages read shards as they read those of ubgen-synth
    with stage_directory(write_to, "synth" if to == "webdataset" else "convert", plan["conversion"]) as stage:
        state = _start_or_resume(write_to, plan)
        _copy_about(origin, write_to)
        made = layout(to, write_to, origin.classes, -(-origin.images // size))
        _make_parts(origin, made, state, size, progress)
        made.finish(_text(read_from, CARD), origin.images)
        stage.finish(
            {}, dataset={"images": origin.images, "shards": made.parts, "classes": len(origin.classes)}
        )
    return origin.images


def open_source(store: Store) -> Source:
    """A finished ubgen dataset by its sidecars, or any directory of tars by looking through all of them."""
    if store.size(MANIFEST) is not None or store.size("run.json") is not None:
        dataset = open_dataset(store)
        shards = tuple(dataset.shards)
        return Source(store, tuple((s.tar, s.count) for s in shards), tuple(dataset.classes), shards)
    tars = [name for name in store.names() if name.endswith(".tar") and not name.startswith(".")]
    if not tars:
        raise UserError(
            f"{store} holds no .tar file; expected a ubgen dataset or a directory of WebDataset tars"
        )
    labels = [scan_labels(store, name) for name in tars]
    largest = max((max(of_tar, default=-1) for of_tar in labels), default=-1)
    if largest < 0:
        raise UserError(f"{store}: its .tar files hold no sample")
    named = store.size(CLASSES) is not None
    if not named and largest >= _MOST_NAMELESS:
        raise UserError(
            f"{store}: a sample has class {largest}; so many classes need a {CLASSES} beside the tars"
        )
    classes = read_classes(store) if named else _nameless(largest + 1)
    counted = zip(tars, map(len, labels), strict=True)
    return Source(store, tuple((name, count) for name, count in counted if count), tuple(classes))


def _nameless(count: int) -> list[dict[str, Any]]:
    width = len(str(count - 1))
    names = [f"{index:0{width}d}" for index in range(count)]
    return [{"index": i, "id": name, "name": f"class {i}", "prompt": ""} for i, name in enumerate(names)]


def _plan(source: Source, to: Format, shard_size: int) -> dict[str, Any]:
    """All that the output depends on. Sizes stand for the tars' content: hashing them would take as long as copying."""
    sizes = source.store.sizes()
    content = [[name, count, sizes[name]] for name, count in source.tars]
    classes = [[entry["id"], entry["name"]] for entry in source.classes]
    digest = hashlib.sha256(json.dumps([content, classes]).encode()).hexdigest()
    about = {"source": source.store.url, "to": to, "shard_size": shard_size}
    return {"conversion": about, "source_digest": digest, "images": source.images, "parts": {}}


def _refuse_other_content(store: Store) -> None:
    if store.local_path and store.local_path.exists() and not store.local_path.is_dir():
        raise UserError(f"{store} is not a directory")
    names = store.entries()
    if PLAN in names and MANIFEST in names:
        raise UserError(f"{store} is already finished; choose another output directory")
    if names and PLAN not in names:
        raise UserError(f"{store} holds something else ({names[0]}); choose an empty output directory")


def _start_or_resume(store: Store, plan: dict[str, Any]) -> dict[str, Any]:
    if store.size(PLAN) is None:
        store.write(PLAN, json.dumps(plan, indent=1) + "\n")
        return plan
    try:
        state = json.loads(store.read(PLAN))
        same = all(state[name] == plan[name] for name in ("conversion", "source_digest", "images"))
        parts = isinstance(state["parts"], dict)
    except (ValueError, KeyError, TypeError):
        same = parts = False
    if not same or not parts:
        raise UserError(
            f"{store} holds another conversion than this ({store.address(PLAN)}); choose another output directory"
        )
    return state


def _copy_about(source: Source, out: Store) -> None:
    ids, names, prompts = (
        [entry.get(key, "") for entry in source.classes] for key in ("id", "name", "prompt")
    )
    write_classes(out, ids, names, prompts)
    if (ledger := _text(source.store, REJECTIONS)) is not None:
        out.write(REJECTIONS, ledger)


def _make_parts(source: Source, made: Layout, state: dict[str, Any], size: int, progress: Progress) -> None:
    done = 0
    progress(done, source.images)
    for number in range(made.parts):
        start, stop = number * size, min((number + 1) * size, source.images)
        if not _is_whole(made, number, state["parts"].get(str(number))):
            samples = _told(source.samples(start, stop), progress, done, source.images)
            part = made.write(number, samples)
            state["parts"][str(number)] = {"name": part.name, "bytes": part.bytes}
            made.store.write(PLAN, json.dumps(state, indent=1) + "\n")
        done += stop - start
        progress(done, source.images)


def _is_whole(made: Layout, number: int, part: Any) -> bool:
    return isinstance(part, dict) and {"name", "bytes"} <= set(part) and made.is_whole(number, part)


def _told(samples: Iterator[Sample], progress: Progress, done: int, total: int) -> Iterator[Sample]:
    for count, sample in enumerate(samples):
        yield sample
        if count % 100 == 99:
            progress(done + count + 1, total)


def _text(store: Store, name: str) -> str | None:
    try:
        return store.read(name).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
