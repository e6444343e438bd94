"""Shards: `shard-000000.tar` holds the samples, `.idx` is DALI's index of it, `.json` says that both are whole.

A sample is three members with one key: `KEY.jpg` (or .png), `KEY.cls` (the class index as text) and `KEY.json`.
Keys are digits made from the sample's place in the dataset, never from a class name, so that no name can do harm.

The sidecar is one JSON object whose head says enough to tell a whole shard, so that thousands are looked through
quickly: shard, count, bytes (of the tar), sha256 (of the tar), extension (of the images), rest (bytes of the sidecar
from `"samples"` to its end), then samples and rejected.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.dataset.index import index_line, index_text
from ubgen.dataset.metadata import mark_synthetic
from ubgen.dataset.tar import BLOCK, archive_end, member, padded

JPEG_QUALITY = 95
EXTENSIONS = ("jpg", "png")
_FILE = re.compile(r"shard-(\d{6,})\.(?:tar|idx|json)|\.shard-(\d{6,})\.(?:tar|idx|json)\..+\.tmp")
_SAMPLES = b'"samples":'
_HEAD = 1024  # bytes that hold the sidecar's head
_META = json.JSONEncoder(sort_keys=True, allow_nan=False).encode
_ENTRY = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def shard_files(names: Iterable[str]) -> dict[str, int]:
    """Those of `names` that are files of shards, with the shard's number: tars, indices, sidecars, and what killed
    writers left of them."""
    matches = ((name, _FILE.fullmatch(name)) for name in names)
    return {name: int(match[1] or match[2]) for name, match in matches if match}


def encode_image(image: Image.Image | np.ndarray, extension: str) -> bytes:
    """PNG (lossless), or JPEG of quality 95 without chroma subsampling; both say that the image is synthetic.

    `image` may be an array (H,W,3) of uint8.
    """
    if extension == "png":
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=6)
        return mark_synthetic(buffer.getvalue())
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    # not Pillow, which holds Python's lock while it encodes: more threads would be no faster, and others would wait
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), JPEG_QUALITY, colorspace="RGB", colorsubsampling="444", fastdct=False
    )
    return mark_synthetic(data)


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

    @property
    def tar(self) -> str:
        return f"{shard_name(self.index)}.tar"

    @property
    def sidecar(self) -> str:
        return f"{shard_name(self.index)}.json"

    def samples(self) -> list[dict[str, Any]]:
        """An entry for each sample, read from the sidecar now; UserError if it is damaged.

        Each has "key", "class_index", its scores (None where one was not finite), "flag" where the sample was kept
        although it was not acceptable, and "image", "cls" and "json": [offset, size] of the bytes in the tar.
        """
        return self._list("samples", self.count)

    def rejected(self) -> list[dict[str, Any]]:
        """The ledger: what was drawn and rejected while this shard was made."""
        return self._list("rejected")

    def _list(self, name: str, count: int | None = None) -> list[dict[str, Any]]:
        try:
            entries = json.loads(self.store.read(self.sidecar))[name]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            entries = None
        if not isinstance(entries, list) or count not in (None, len(entries)):
            raise UserError(f"{self.store.address(self.sidecar)} is damaged; make the shard again")
        return entries


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
    ) -> None:
        """Add a sample. `position` is its number in the dataset, larger than that of the sample before.

        `image` may be encoded already; its bytes are then taken as they are. `meta` goes to KEY.json, where
        `class_index`, `scores` and `flag` are added; these go to the sidecar too. A score that is not finite is
        stored as null. `flag` says why a sample that is not acceptable was kept.
        """
        if position <= self._last:
            raise ValueError(
                f"{self._name}: position {position} comes after {self._last}; they must increase"
            )
        key = f"{position:09d}"
        about: dict[str, Any] = {"class_index": class_index, **_finite(scores or {})}
        if flag is not None:
            about["flag"] = flag
        members = {
            self._extension: image if isinstance(image, bytes) else encode_image(image, self._extension),
            "cls": str(class_index).encode(),
            "json": _META({**meta, **about}).encode(),
        }
        places = self._add(key, members)
        first, *others = places.values()
        entry = {"key": key, **about, "image": first, **dict(zip(("cls", "json"), others, strict=True))}
        self._samples.append(_ENTRY(entry))
        self._index.append(index_line(key, places))
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
            self._append(archive_end(self._offset))
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._drop_another_sidecar()
        self._stack.close()
        self._store.write(f"{self._name}.idx", index_text(self._index))
        self._store.write(f"{self._name}.json", self._sidecar())

    def _add(self, key: str, members: Mapping[str, bytes]) -> dict[str, list[int]]:
        """[offset, size] of each member's bytes."""
        places = {}
        parts = []
        offset = self._offset
        for extension, data in members.items():
            parts += member(f"{key}.{extension}", data)
            places[extension] = [offset + BLOCK, len(data)]
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

    def _sidecar(self) -> str:
        rest = f'"samples":[{",".join(self._samples)}],"rejected":[{",".join(self._rejected)}]}}\n'
        head = {
            "shard": f"{self._name}.tar",
            "count": len(self._samples),
            "bytes": self._offset,
            "sha256": self._digest.hexdigest(),
            "extension": self._extension,
            "rest": len(rest),
        }
        return f"{_ENTRY(head)[:-1]},{rest}"


def _finite(scores: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scores.items()
    }


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
    names = [f"{shard_name(index)}{ending}" for index in wanted for ending in (".tar", ".json")]
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
        info = ShardInfo(store, index, head["count"], head["bytes"], head["sha256"], head["extension"])
        whole = head["shard"] == info.tar and sizes[f"{name}.json"] == cut + head["rest"]
    except (ValueError, KeyError, TypeError):
        return None
    return info if whole and sizes[f"{name}.tar"] == info.bytes and _plausible(info) else None


def _plausible(info: ShardInfo) -> bool:
    """The types of a head that someone may have edited."""
    return (
        type(info.count) is int
        and info.count >= 0
        and type(info.bytes) is int
        and isinstance(info.sha256, str)
    ) and info.extension in EXTENSIONS
