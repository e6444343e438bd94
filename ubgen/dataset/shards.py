"""Shards: `shard-000000.tar` holds the samples, `.idx` is DALI's index of it, `.npy` the samples' image features where
they are known, and `.json` says that all are whole.

A sample is three members with one key: `KEY.jpg` (or .png), `KEY.cls` (the class index as text) and `KEY.json`.
Keys are digits made from the sample's place in the dataset, never from a class name, so that no name can do harm.

The sidecar is one JSON object. Its head alone shows whether a shard is whole, so that thousands are checked quickly:
shard, count, bytes (of the tar), sha256 (of the tar), extension (of the images), features (where there are any: size
and sha256 of the `.npy`), rest (bytes of the sidecar from `"samples"` to its end). Then come samples and rejected.

The features are a NumPy array (count, D) of float16, L2-normalised, in the order of the samples.

Tar members are USTAR (IEEE Std 1003.1, pax), as `tarfile` writes them but quicker: only name, size and checksum differ
between headers. The index is what DALI's `wds2idx` writes, for `fn.readers.webdataset`.
"""

import hashlib
import io
import json
import math
import re
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.dataset.images import encode_image

EXTENSIONS = ("jpg", "png")
BLOCK = tarfile.BLOCKSIZE
Place = tuple[int, int]
"""Offset and size of a member's bytes in the tar."""
_MEMBERS = ("image", "cls", "json")
_NOT_SCORES = {"key", "class_index", "flag", *_MEMBERS}
_FILE = re.compile(r"shard-(\d{6,})\.(?:tar|idx|npy|json)|\.shard-(\d{6,})\.(?:tar|idx|npy|json)\..+\.tmp")
_SAMPLES = b'"samples":'
_HEAD = 1024  # bytes that hold the sidecar's head
_META = json.JSONEncoder(sort_keys=True, allow_nan=False).encode
_ENTRY = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def shard_files(names: Iterable[str]) -> dict[str, int]:
    """Those of `names` that are files of shards, with the shard's number: tars, indices, features, sidecars, and what
    killed writers left of them."""
    matches = ((name, _FILE.fullmatch(name)) for name in names)
    return {name: int(match[1] or match[2]) for name, match in matches if match}


def number(value: object) -> float | None:
    """A score; None for what is not a finite number, which metadata of others may hold."""
    usable = (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )
    return float(value) if usable else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """A sample's entry in the sidecar."""

    key: str
    class_index: int
    scores: dict[str, float | None]
    """None where a score was not finite."""
    flag: str | None
    """Why the sample was kept although it was not acceptable."""
    image: Place
    cls: Place
    json: Place

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "SampleRecord":
        """KeyError, TypeError or ValueError for what `to_entry` cannot have given."""
        scores = {name: number(value) for name, value in entry.items() if name not in _NOT_SCORES}
        (label,) = _integers([entry["class_index"]], 1, 2**31)
        places = [_integers(entry[name], 2, 2**63) for name in _MEMBERS]
        return cls(str(entry["key"]), label, scores, entry.get("flag"), *places)  # type: ignore[arg-type]

    def to_entry(self) -> dict[str, Any]:
        places = {"image": self.image, "cls": self.cls, "json": self.json}
        return {"key": self.key, **annotations(self.class_index, self.scores, self.flag), **places}


def _integers(values: Any, count: int, limit: int) -> tuple[int, ...]:
    if len(values) != count or not all(type(value) is int and 0 <= value < limit for value in values):
        raise ValueError(f"{values!r}: expected {count} integers")
    return tuple(values)


def annotations(class_index: int, scores: Mapping[str, float | None], flag: str | None) -> dict[str, Any]:
    """What the sidecar and KEY.json both say of a sample."""
    return {"class_index": class_index, **scores, **({} if flag is None else {"flag": flag})}


class FeaturesFile(NamedTuple):
    """What the sidecar's head says of the file of features."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "FeaturesFile":
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Sidecar(NamedTuple):
    """What follows the head."""

    samples: list[SampleRecord]
    rejected: list[dict[str, Any]]


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard, as the head of its sidecar describes it."""

    store: Store
    index: int
    count: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar, hexadecimal."""
    extension: str
    """Of the images: jpg or png."""
    features: FeaturesFile | None = None

    @property
    def tar(self) -> str:
        return f"{shard_name(self.index)}.tar"

    @property
    def sidecar(self) -> str:
        return f"{shard_name(self.index)}.json"

    def read(self) -> Sidecar:
        """The sidecar as it is now; UserError if it is damaged."""
        try:
            content = json.loads(self.store.read(self.sidecar))
            sidecar = Sidecar([SampleRecord.from_entry(e) for e in content["samples"]], content["rejected"])
            rejected = sidecar.rejected
            if isinstance(rejected, list) and all(isinstance(entry, dict) for entry in rejected):
                return sidecar
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise self.damaged()

    def samples(self) -> list[SampleRecord]:
        """The sidecar's samples, as many as its head states."""
        samples = self.read().samples
        if len(samples) != self.count:
            raise self.damaged()
        return samples

    def rejected(self) -> list[dict[str, Any]]:
        """The ledger: what was drawn and rejected while this shard was made."""
        return self.read().rejected

    def read_features(self) -> np.ndarray | None:
        """(count, D) float16, L2-normalised CLIP image features; None where none were kept. UserError if damaged."""
        if self.features is None:
            return None
        try:
            data = self.store.read(f"{shard_name(self.index)}.npy")
            rows: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise self.damaged(".npy") from None
        if self.features != FeaturesFile.of(data) or rows.shape[:1] != (self.count,) or rows.ndim != 2:
            raise self.damaged(".npy")
        return rows

    def damaged(self, ending: str = ".json") -> UserError:
        where = self.store.address(shard_name(self.index) + ending)
        return UserError(
            f"{where} is damaged; ubgen-dataset verify --repair takes the shard away, and the same ubgen-synth command "
            "makes it again"
        )


class ShardWriter:
    """Writes one shard to a directory or URL; use it as a context manager.

    The tar grows under a temporary name (for object storage: in a local temporary file). Leaving the block flushes it
    to disk and puts it in place, then the index, and only then the sidecar. After an exception nothing is put in
    place. The bytes depend on the samples alone: no times, users or machine names are stored.
    """

    def __init__(self, out: str | Path | Store, index: int, extension: str = "jpg") -> None:
        if extension not in EXTENSIONS:
            raise ValueError(f"extension must be one of {EXTENSIONS}, not {extension!r}")
        self._store = open_store(out)
        self._name = shard_name(index)
        self._extension = extension
        self._digest = hashlib.sha256()
        self._offset = 0
        self._last = -1
        # kept as text: a million dictionaries would not be small
        self._samples: list[str] = []
        self._rejected: list[str] = []
        self._index: list[str] = []
        self._features: list[np.ndarray] = []
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._file: BinaryIO = self._stack.enter_context(self._store.new_file(f"{self._name}.tar"))
        return self

    def write(
        self,
        position: int,
        image: Image.Image | np.ndarray | bytes,
        class_index: int,
        meta: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
        flag: str | None = None,
        features: np.ndarray | None = None,
    ) -> None:
        """Add a sample. `position` is its number in the dataset, larger than the position of the sample before.

        `image` may be encoded already; its bytes are then taken as they are. `meta` goes to KEY.json, where
        `class_index`, `scores` and `flag` are added; these go to the sidecar too. A score that is not finite is
        stored as null. `flag` says why a sample that is not acceptable was kept. `features` (D,) are the image's; all
        samples of a shard have them, or none.
        """
        if self._samples and bool(self._features) != (features is not None):
            raise ValueError(f"{self._name}: some samples have features and some have none")
        if position <= self._last:
            raise ValueError(
                f"{self._name}: position {position} comes after {self._last}; they must increase"
            )
        key, finite = f"{position:09d}", _finite(scores or {})
        members = {
            self._extension: image if isinstance(image, bytes) else encode_image(image, self._extension),
            "cls": str(class_index).encode(),
            "json": _META({**meta, **annotations(class_index, finite, flag)}).encode(),
        }
        record = SampleRecord(key, class_index, finite, flag, *self._add(key, members))
        self._samples.append(_ENTRY(record.to_entry()))
        self._index.append(_index_line(record, self._extension))
        if features is not None:
            self._features.append(np.asarray(features, np.float16))
        self._last = position

    def reject(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the ledger: class_index, image_index, attempt, reason and scores of a rejected draw."""
        self._rejected.append(_ENTRY(_finite(entry)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        try:
            self._append(_archive_end(self._offset))
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._drop_another_sidecar()
        self._stack.close()
        self._store.write(f"{self._name}.idx", _index_text(self._index))
        features = None
        if self._features:
            data = _npy(np.stack(self._features))
            self._store.write(f"{self._name}.npy", data)
            features = FeaturesFile.of(data)
        self._store.write(f"{self._name}.json", self._sidecar(features))

    def _add(self, key: str, members: Mapping[str, bytes]) -> list[Place]:
        places, parts, offset = [], [], self._offset
        for extension, data in members.items():
            parts += _tar_member(f"{key}.{extension}", data)
            places.append((offset + BLOCK, len(data)))
            offset += BLOCK + padded(len(data))
        self._append(b"".join(parts))
        return places

    def _append(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._offset += len(data)

    def _drop_another_sidecar(self) -> None:
        """One that describes another tar could fit this one by its size, if the run ended before ours is written."""
        name = f"{self._name}.json"
        with suppress(FileNotFoundError):
            if self._digest.hexdigest().encode() not in self._store.read_range(name, 0, _HEAD):
                self._store.delete(name)

    def _sidecar(self, features: FeaturesFile | None) -> str:
        rest = f'"samples":[{",".join(self._samples)}],"rejected":[{",".join(self._rejected)}]}}\n'
        head = {
            "shard": f"{self._name}.tar",
            "count": len(self._samples),
            "bytes": self._offset,
            "sha256": self._digest.hexdigest(),
            "extension": self._extension,
            **({} if features is None else {"features": features._asdict()}),
            "rest": len(rest),
        }
        return f"{_ENTRY(head)[:-1]},{rest}"


def _npy(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def _finite(scores: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scores.items()
    }


_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
# the checksum counts its own field as spaces; empty name, and no size
_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[136:148]) + 8 * ord(" ") + sum(_EMPTY[156:])


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _tar_member(name: str, data: bytes) -> list[bytes]:
    """Header, content and padding of a regular file. `name` is ASCII and at most 100 bytes, `data` under 8 GiB."""
    path = name.encode("ascii")
    size = b"%011o\0" % len(data)
    if len(path) > 100 or len(size) > 12:
        raise ValueError(f"{name}: name or content is too long for a tar header")
    checksum = b"%06o\0 " % (_SUM + sum(path) + sum(size))
    header = b"".join(
        (path.ljust(100, b"\0"), _EMPTY[100:124], size, _EMPTY[136:148], checksum, _EMPTY[156:])
    )
    return [header, data, bytes(-len(data) % BLOCK)]


def _archive_end(offset: int) -> bytes:
    """What closes an archive of `offset` bytes: two empty blocks, and zeros up to a whole record."""
    return bytes(-(offset + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK)


def index_of(samples: Iterable[SampleRecord], extension: str) -> str:
    """DALI's index of a shard: a line for each sample, with extension, offset, size and name of each member."""
    return _index_text([_index_line(sample, extension) for sample in samples])


def _index_line(sample: SampleRecord, extension: str) -> str:
    members = {extension: sample.image, "cls": sample.cls, "json": sample.json}
    return " ".join(f"{ext} {offset} {size} {sample.key}.{ext}" for ext, (offset, size) in members.items())


def _index_text(lines: Sequence[str]) -> str:
    return "\n".join((f"v1.2 {len(lines)}", *lines, ""))


def finished_shard(where: str | Path | Store, index: int) -> ShardInfo | None:
    """The shard if it is finished: tar and sidecar are there, both of the size that the sidecar states."""
    return finished_shards(where, [index]).get(index)


def finished_shards(where: str | Path | Store, indices: Iterable[int] | None = None) -> dict[int, ShardInfo]:
    """The finished shards among `indices` (default: among all that are there), by index in increasing order.

    Only the head of each sidecar is read.
    """
    store = open_store(where)
    if indices is None:
        indices = sorted(
            {index for name, index in shard_files(store.names()).items() if name.endswith(".json")}
        )
    wanted = list(indices)
    names = [f"{shard_name(index)}{ending}" for index in wanted for ending in (".tar", ".npy", ".json")]
    sizes: Mapping[str, int | None]
    sizes = store.sizes() if len(wanted) > 1 else {name: store.size(name) for name in names}
    there = [i for i in wanted if all(sizes.get(f"{shard_name(i)}{ending}") for ending in (".tar", ".json"))]
    heads = store.read_starts([f"{shard_name(index)}.json" for index in there], _HEAD)
    infos = ((index, _info(store, index, head, sizes)) for index, head in zip(there, heads, strict=True))
    return {index: info for index, info in infos if info}


def _info(store: Store, index: int, start: bytes, sizes: Mapping[str, int | None]) -> ShardInfo | None:
    """None unless `start` is the beginning of a sidecar and both files have the size that it states."""
    cut = start.find(_SAMPLES)
    name = shard_name(index)
    try:
        head = json.loads(start[: max(cut, 1) - 1] + b"}")
        features = FeaturesFile(**head["features"]) if "features" in head else None
        info = ShardInfo(
            store, index, head["count"], head["bytes"], head["sha256"], head["extension"], features
        )
        whole = head["shard"] == info.tar and sizes[f"{name}.json"] == cut + head["rest"]
        whole = whole and (features is None or sizes.get(f"{name}.npy") == features.size)
    except (ValueError, KeyError, TypeError):
        return None
    return info if whole and sizes[f"{name}.tar"] == info.bytes and _plausible(info) else None


def _plausible(info: ShardInfo) -> bool:
    """The types of a head that someone may have edited."""
    return (
        type(info.count) is int
        and 0 <= info.count < 2**31
        and type(info.bytes) is int
        and isinstance(info.sha256, str)
    ) and info.extension in EXTENSIONS
