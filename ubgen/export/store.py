"""The compiled networks in an engine directory: each is moved in whole, and known by its key from then on."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.stage import atomic_write, read_manifest

_STAGING = ".building"


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


class Store:
    """The directory `out`, held by one writer. A network's files are final once `NAME.json` is there beside them."""

    def __init__(self, out: Path, hash_of: Callable[[Path], str]) -> None:
        self.out = out
        self.hash_of = hash_of

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty directory on the same disk for files that are not proven yet; gone afterwards, also after a kill."""
        path = self.out / _STAGING
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def find(self, name: str, key: str) -> Built | None:
        """The network `name` when it is here whole under this very key."""
        built = self._read(name)
        return built if built and built.key == key and self._whole(built) else None

    def relative(self, name: str, graph: str) -> Built | None:
        """The network `name` when it is here whole with the same graph, whatever its weights."""
        built = self._read(name)
        return built if built and built.graph == graph and self._whole(built) else None

    def _read(self, name: str) -> Built | None:
        try:
            values = json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))
            return Built(**{**values, "kept_float32": tuple(values["kept_float32"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _whole(self, built: Built) -> bool:
        try:
            return self.intact(built.entry["files"])
        except (AttributeError, KeyError, TypeError):
            return False

    def finished(self, key: str) -> dict[str, Any] | None:
        """The manifest, when the directory holds the engine `key` whole."""
        try:
            manifest = read_manifest(self.out, "export")
            engine = manifest["engine"]
            files = [network["files"] for network in engine["networks"].values()]
            whole = engine["key"] == key and all(self.intact(part) for part in [*files, engine["extras"]])
        except (UserError, KeyError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def intact(self, files: Mapping[str, str]) -> bool:
        return all((self.out / f).is_file() and self.hash_of(self.out / f) == h for f, h in files.items())

    def add(self, name: str, built: Built, files: Sequence[Path]) -> Built:
        """Move `files` in, in place of what `name` had before, and make them final; `built` with their hashes."""
        for old in (
            self.out / f"{name}.json",
            *self.out.glob(f"{name}.*"),
        ):  # the mark of being final goes first
            old.unlink(missing_ok=True)
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, self.out / file.name)
        hashes = {file.name: self.hash_of(self.out / file.name) for file in files}
        final = replace(built, entry={**built.entry, "file": files[0].name, "files": hashes})
        atomic_write(self.out / f"{name}.json", json.dumps(asdict(final), indent=2) + "\n")
        return final
