"""Whether a dataset is whole: every byte of it is read."""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.core.locks import hold
from ubgen.core.stage import MANIFEST, RUN, read_run
from ubgen.dataset.card import CLASSES, REJECTIONS, read_classes
from ubgen.dataset.reader import existing, expected_shards, no_shards
from ubgen.dataset.shards import (
    BLOCK,
    SampleRecord,
    ShardInfo,
    Sidecar,
    annotations,
    finished_shards,
    index_of,
    padded,
    shard_files,
    shard_name,
)

_FORMATS = {"jpg": "JPEG", "png": "PNG"}
_MOST = 20  # problems that are listed of one shard
_CHUNK = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """`shard` is None for what concerns the whole dataset."""

    shard: int | None
    text: str

    def __str__(self) -> str:
        return self.text if self.shard is None else f"{shard_name(self.shard)}: {self.text}"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is wrong with it. `class_counts` is by class index."""

    where: str
    shards: int
    images: int
    bytes: int
    decoded: bool
    rejected: int
    class_counts: list[int]
    problems: list[Problem]

    @property
    def damaged(self) -> list[int]:
        """Shards that have to be made again."""
        return sorted({problem.shard for problem in self.problems if problem.shard is not None})


@dataclass
class _Shard:
    counts: np.ndarray
    bytes: int = 0
    images: int = 0
    first: str = ""
    last: str = ""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(
    where: str | Path | Store,
    *,
    decode: bool = True,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Verified:
    """Read all of a dataset, finished or not, and compare tars, indices, sidecars, ledger and counts.

    With `decode` every image is decoded too. `workers` threads (default: one for each core) take a shard each;
    `progress` is called with shards done and their total. Damage is reported, not raised; UserError where there is
    no dataset at all.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    store = existing(where)
    classes = len(read_classes(store))
    numbers = _shard_numbers(store)
    found = finished_shards(store, numbers)
    total = np.zeros(classes, np.int64)
    images = size = 0
    problems: list[Problem] = []
    rejected: list[dict[str, Any]] = []
    last = ""
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    progress(0, len(numbers))
    try:
        results = pool.map(lambda number: _check_shard(found.get(number), classes, decode), numbers)
        for done, (number, result) in enumerate(zip(numbers, results, strict=True), 1):
            if result.first and result.first <= last:
                result.problems.append(
                    f"its first key {result.first} does not follow {last} of the shard before it"
                )
            last = result.last or last
            problems += [Problem(number, text) for text in result.problems]
            total += result.counts
            images, size, rejected = images + result.images, size + result.bytes, rejected + result.rejected
            progress(done, len(numbers))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the shards that wait are not looked at
    # counts follow from what is there: they would only repeat that shards are damaged
    if not problems:
        problems = [
            Problem(None, text) for text in (*_wrong_counts(store, total), *_wrong_ledger(store, rejected))
        ]
    return Verified(store.url, len(numbers), images, size, decode, len(rejected), total.tolist(), problems)


def repair(where: str | Path | Store, verified: Verified) -> list[str]:
    """Delete the sidecars of the damaged shards, and the manifest: what makes the dataset again makes just these.

    Names of the deleted files. UserError while another process writes to the dataset.
    """
    store = open_store(where)
    names = [f"{shard_name(number)}.json" for number in verified.damaged]
    names = [name for name in (MANIFEST, *names) if names and store.size(name) is not None]
    with hold(store):
        for name in names:
            store.delete(name)
    return names


def _shard_numbers(store: Store) -> list[int]:
    """As many as the manifest says; of an unfinished dataset, those that have a sidecar."""
    if store.size(MANIFEST) is not None:
        return list(range(expected_shards(store)))
    files = shard_files(store.names())
    if numbers := sorted({number for name, number in files.items() if name.endswith(".json")}):
        return numbers
    raise no_shards(store)


def _check_shard(shard: ShardInfo | None, classes: int, decode: bool) -> _Shard:
    result = _Shard(np.zeros(classes, np.int64))
    if shard is None:
        result.problems.append("tar or sidecar is missing, or not of the size that the sidecar states")
        return result
    try:
        sidecar = shard.read()
        _check_sidecar(shard, sidecar, classes, result)
        with shard.store.open(shard.tar) as file:
            _check_tar(file, shard, sidecar.samples, decode, result)
        index = shard.store.read(f"{shard_name(shard.index)}.idx").decode()
        if index != index_of(sidecar.samples, shard.extension):
            result.problems.append("its .idx does not index the tar")
        shard.read_features()
    except PermissionError:
        raise  # no damage to repair
    except UserError as error:
        result.problems.append(str(error))
    except (OSError, LookupError, TypeError, ValueError, OverflowError) as error:
        result.problems.append(
            f"cannot be checked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    if len(result.problems) > _MOST:
        more = len(result.problems) - _MOST
        result.problems[_MOST:] = [f"and {more} problems more"]
    return result


def _check_sidecar(shard: ShardInfo, sidecar: Sidecar, classes: int, result: _Shard) -> None:
    samples, result.rejected = sidecar
    labels = np.array([sample.class_index for sample in samples], np.int64)
    unknown = labels >= classes
    result.images, result.bytes = len(samples), shard.bytes
    result.counts += np.bincount(labels[~unknown], minlength=classes)
    if len(samples) != shard.count:
        result.problems.append(f"its sidecar states {shard.count} samples and lists {len(samples)}")
    for index in np.flatnonzero(unknown):
        result.problems.append(
            f"sample {samples[index].key} has class {labels[index]}; {CLASSES} has {classes} classes, from 0"
        )
    keys = [sample.key for sample in samples]
    result.first, result.last = (keys[0], keys[-1]) if keys else ("", "")
    for before, after in itertools.pairwise(keys):
        if before >= after:
            result.problems.append(f"key {after[:40]} does not follow {before[:40]}")
    for entry in result.rejected:
        if not _is_rejection(entry, classes):
            result.problems.append(f"a rejection without a reason or a known class: {str(entry)[:100]}")


def _is_rejection(entry: Mapping[str, Any], classes: int) -> bool:
    label, *numbers = (entry.get(name, 0) for name in ("class_index", "seed", "image_index", "attempt"))
    if "class_index" not in entry or not entry.get("reason"):
        return False
    return type(label) is int and 0 <= label < classes and all(type(value) is int for value in numbers)


def _check_tar(
    file: BinaryIO, shard: ShardInfo, samples: list[SampleRecord], decode: bool, result: _Shard
) -> None:
    """One pass: the tar is what the samples' places say, and has the checksum."""
    digest = hashlib.sha256()
    agrees = True
    place = 0
    for sample in samples:
        members = {shard.extension: sample.image, "cls": sample.cls, "json": sample.json}
        contents = {}
        for extension, (offset, size) in members.items():
            agrees = agrees and offset == place + BLOCK and size <= shard.bytes - offset
            if not agrees:
                break
            block = file.read(BLOCK + padded(size))
            digest.update(block)
            place = offset + padded(size)
            agrees = _is_member(block, f"{sample.key}.{extension}", size)
            contents[extension] = block[BLOCK : BLOCK + size]
        if not agrees:
            result.problems.append(f"the tar has no sample {sample.key[:40]} where the sidecar says")
            break
        result.problems += _wrong_content(sample, contents, shard.extension, decode)
    while rest := file.read(_CHUNK):
        digest.update(rest)
        if agrees and rest.strip(b"\0"):
            result.problems.append("the tar holds more than its sidecar lists")
            agrees = False
    if digest.hexdigest() != shard.sha256:
        result.problems.append("its SHA-256 is not the one that its sidecar states")


def _is_member(block: bytes, name: str, size: int) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return info.isreg() and (info.name, info.size) == (name, size)


def _wrong_content(
    sample: SampleRecord, contents: Mapping[str, bytes], extension: str, decode: bool
) -> list[str]:
    key, problems = sample.key, []
    if contents["cls"] != str(sample.class_index).encode():
        problems.append(f"{key}.cls is not the class {sample.class_index} of the sidecar")
    try:
        meta = json.loads(contents["json"])
        stated = {"flag": None, **annotations(sample.class_index, sample.scores, sample.flag)}
        agrees = all(meta.get(name) == value for name, value in stated.items())
    except (ValueError, AttributeError, RecursionError):
        agrees = False
    if not agrees:
        problems.append(f"{key}.json does not say what the sidecar says")
    if decode and (reason := _undecodable(contents[extension], extension)):
        problems.append(f"{key}.{extension} cannot be decoded ({reason})")
    return problems


def _undecodable(data: bytes, extension: str) -> str:
    """Why; empty for a good image."""
    try:
        with Image.open(io.BytesIO(data), formats=[_FORMATS[extension]]) as image:
            image.load()
    except Exception as error:  # Pillow's decoders fail in many ways on damaged files
        return " ".join(str(error).split())[:100] or type(error).__name__
    return ""


def _wrong_counts(store: Store, counts: np.ndarray) -> list[str]:
    """A finished dataset of ubgen-synth has as many images of each class as its run says."""
    try:
        wanted = read_run(store, "synth").get("--per-class")
    except UserError:  # unknown
        return []
    if store.size(MANIFEST) is None or type(wanted) is not int:
        return []
    wrong = [
        f"class {i} has {n} images; {RUN} says {wanted}" for i, n in enumerate(counts.tolist()) if n != wanted
    ]
    return wrong[:_MOST]


def _wrong_ledger(store: Store, rejected: list[dict[str, Any]]) -> list[str]:
    """rejections.jsonl holds what the sidecars hold."""
    try:
        lines = [json.loads(line) for line in store.read(REJECTIONS).decode().splitlines()]
        listed = sorted(map(_identity, lines))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return [f"{REJECTIONS} is not a list of rejections"]
    if listed != sorted(map(_identity, rejected)):
        return [
            f"{REJECTIONS} lists {len(lines)} rejections, which are not the {len(rejected)} of the sidecars"
        ]
    return []


def _identity(entry: Mapping[str, Any]) -> tuple[int, int, int, int, str]:
    return (
        int(entry.get("seed", 0)),
        int(entry["class_index"]),
        int(entry.get("image_index", 0)),
        int(entry.get("attempt", 0)),
        str(entry.get("reason")),
    )
