"""An engine directory while it is written: each compiled network is moved in whole and known by its key."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.core.stage import content_hash, file_digest, read_manifest

_STAGING = ".building"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5"}
_CACHE = ".hashes.json"
_SMALL = 16 * 2**20  # bytes: hashing fewer takes no time
_SETTLED = 1.0  # seconds: within one tick of a file system's clock a file may change and keep its time


@dataclass(frozen=True)
class Built:
    """One compiled network. `entry` is what the engine's manifest says of it, its files and their hashes included.

    `kept_float32` and `error_without`: see `ParityRow`.
    """

    key: str
    graph: str  # the key of all but the weights
    entry: Mapping[str, Any]
    kept_float32: tuple[str, ...] = ()
    error_without: float | None = None


class EngineDirectory:
    """The directory `path`, held by one writer. A network's files are final once `NAME.json` is there beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes = Hashes(path / _CACHE)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty directory on the same disk for files that are not proven yet; gone afterwards, also after a kill."""
        path = self.path / _STAGING
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def find(self, name: str, *, key: str | None = None, graph: str | None = None) -> Built | None:
        """The network `name` when it is here whole, under this very key, or with this graph whatever its weights."""
        try:
            values = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            built = Built(**{**values, "kept_float32": tuple(values["kept_float32"])})
            same = built.key == key if key else built.graph == graph
            return built if same and self._intact(built.entry["files"]) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def forget(self, names: Iterable[str]) -> None:
        """From here on these networks count as not built."""
        for name in names:
            (self.path / f"{name}.json").unlink(missing_ok=True)

    def finished(self, key: str) -> dict[str, Any] | None:
        """The manifest, when the directory holds the engine `key` whole."""
        try:
            manifest = read_manifest(self.path, "export")
            engine = manifest["engine"]
            files = [network["files"] for network in engine["networks"].values()]
            whole = engine["key"] == key and all(self._intact(part) for part in [*files, engine["extras"]])
        except (UserError, KeyError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def _intact(self, files: Mapping[str, str]) -> bool:
        return all(
            (self.path / file).is_file() and self.hashes(self.path / file) == digest
            for file, digest in files.items()
        )

    def add(self, name: str, built: Built, files: Sequence[Path]) -> Built:
        """Move `files` in, in place of what `name` had before, and make them final; `built` with their hashes."""
        mark = self.path / f"{name}.json"  # of being final: it goes first
        for old in (mark, *self.path.glob(f"{name}.*")):
            old.unlink(missing_ok=True)
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, self.path / file.name)
        hashes = {file.name: self.hashes(self.path / file.name) for file in files}
        final = replace(built, entry={**built.entry, "file": files[0].name, "files": hashes})
        atomic_write(mark, json.dumps(asdict(final), indent=2) + "\n")
        return final

    def add_extras(self, inputs: Mapping[str, Path]) -> dict[str, str]:
        """Copy what synthesis needs besides networks, both tokenizers and the scheduler's settings; their hashes."""
        sd = inputs["stable_diffusion"]
        sources = {"tokenizer": sd / "tokenizer", "scheduler": sd / "scheduler", "clip": inputs["clip"]}
        hashes = {}
        for name, source in sources.items():
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).mkdir()
            for file in sorted(source.iterdir()):
                if file.is_file() and not _is_weights(file):
                    shutil.copyfile(file, copy := self.path / name / file.name)
                    hashes[f"{name}/{file.name}"] = self.hashes(copy)
        return hashes


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")


class Hashes:
    """`content_hash` with a memory in a file.

    A remembered digest counts only while the file's size, inode, and its times of modification and of change of
    inode are the same to the nanosecond; the last of these cannot be set back by a program.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, list[object]] = _read(cache)
        self._new = False

    def __call__(self, path: Path, only: Iterable[Path] | None = None) -> str:
        return content_hash(path, self._digest, only)

    def save(self) -> None:
        if self._new and self._cache.parent.is_dir():
            atomic_write(self._cache, json.dumps(self._known))

    def _digest(self, file: Path) -> str:
        state = _state(file)
        if state[0] < _SMALL:
            return file_digest(file)
        name = str(file.resolve())
        known = self._known.get(name)
        if known is not None and known[:-1] == state:
            return str(known[-1])
        age = time.time() - max(state[2:]) / 1e9
        if 0 <= age < _SETTLED:
            time.sleep(_SETTLED - age)
        digest = file_digest(file)
        if age >= 0 and _state(file) == state:
            self._known[name] = [*state, digest]
            self._new = True
        return digest


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(cache: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else []
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 5}
