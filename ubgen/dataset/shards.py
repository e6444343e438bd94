"""Shards: `shard-000000.tar` holds the samples, `shard-000000.json` beside it says that it is whole.

A sample is three members with one key: `KEY.jpg` (or .png), `KEY.cls` (the class index as text) and `KEY.json`.
Keys are digits made from the sample's place in the dataset, never from a class name, so that no name can do harm.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ubgen.manifest import atomic_write

JPEG_QUALITY = 95
EXTENSIONS = ("jpg", "png")
_FILE = re.compile(r"shard-(\d{6,})\.(?:tar|json)|\.shard-(\d{6,})\.tar\.tmp")


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def shard_files(directory: Path) -> dict[Path, int]:
    """Every tar, sidecar and unfinished tar in `directory`, with its shard's number."""
    matches = ((path, _FILE.fullmatch(path.name)) for path in sorted(directory.glob("*shard-*")))
    return {path: int(match[1] or match[2]) for path, match in matches if match}


def encode_image(image: Image.Image, extension: str) -> bytes:
    """PNG (lossless), or JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if extension == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard as its sidecar describes it.

    Each entry of `samples` has "key", "class_index", "image" and "json" ([offset, size] of the bytes in the tar),
    and whatever scores the writer was given.
    """

    path: Path
    count: int
    bytes: int
    sha256: str
    samples: list[dict[str, Any]]


class ShardWriter:
    """Writes one shard; use it as a context manager.

    The tar grows under a temporary name; leaving the block flushes it to disk, renames it, and only then writes the
    sidecar. After an exception the temporary file is removed and nothing else is touched. The bytes depend on the
    samples alone: no times, users or machine names are stored.
    """

    def __init__(self, directory: str | Path, index: int, extension: str = "jpg") -> None:
        if extension not in EXTENSIONS:
            raise ValueError(f"extension must be one of {EXTENSIONS}, not {extension!r}")
        self._path = Path(directory) / f"{shard_name(index)}.tar"
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._extension = extension
        self._samples: list[dict[str, Any]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        self._file = self._temporary.open("wb+")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def write(
        self,
        position: int,
        image: Image.Image | bytes,
        class_index: int,
        meta: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Add a sample. `position` is its number in the dataset; `image` may be encoded already.

        `meta` goes to KEY.json, where `class_index` and `scores` are added; the scores go to the sidecar too.
        """
        key = f"{position:09d}"
        if key in self._keys:
            raise ValueError(f"{self._path.name}: a sample at position {position} is already there")
        self._keys.add(key)
        scores = dict(scores or {})
        data = image if isinstance(image, bytes) else encode_image(image, self._extension)
        about = {**meta, **scores, "class_index": class_index}
        self._samples.append(
            {
                "key": key,
                "class_index": class_index,
                **scores,
                "image": self._add(f"{key}.{self._extension}", data),
                "cls": self._add(f"{key}.cls", str(class_index).encode()),
                "json": self._add(f"{key}.json", json.dumps(about, sort_keys=True).encode()),
            }
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _named(self._path):
                    self._finish()
        finally:
            with suppress(OSError):  # on a full disk, closing tries once more to write what is left
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _add(self, name: str, data: bytes) -> list[int]:
        """[offset, size] of the member's bytes."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        with _named(self._path):
            self._tar.addfile(member, io.BytesIO(data))
        return [self._tar.offset - _padded(len(data)), len(data)]

    def _finish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        size = self._file.seek(0, os.SEEK_END)
        os.replace(self._temporary, self._path)
        sidecar = {
            "shard": self._path.name,
            "count": len(self._samples),
            "bytes": size,
            "sha256": digest,
            "samples": self._samples,
        }
        # also flushes the directory, and with it the rename of the tar
        text = json.dumps(sidecar, separators=(",", ":"))
        atomic_write(self._path.with_suffix(".json"), text + "\n")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error from writing to an open file does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def finished_shard(directory: str | Path, index: int) -> ShardInfo | None:
    """The shard's sidecar if the shard is finished: both files are there and the tar has the stated size."""
    name = shard_name(index)
    tar = Path(directory) / f"{name}.tar"
    try:
        sidecar = json.loads((Path(directory) / f"{name}.json").read_text(encoding="utf-8"))
        info = ShardInfo(tar, sidecar["count"], sidecar["bytes"], sidecar["sha256"], sidecar["samples"])
        whole = tar.stat().st_size == info.bytes and len(info.samples) == info.count
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return info if whole else None
