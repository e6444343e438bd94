"""Content hashes that are computed once: a second look at unchanged files of tens of gigabytes takes no time."""

import json
import time
from pathlib import Path

from ubgen.core.stage import atomic_write, content_hash, file_digest

CACHE = ".hashes.json"
_SMALL = 16 * 2**20  # bytes: hashing fewer takes no time
_SETTLED = 1.0  # seconds: within one tick of a file system's clock a file may change and keep its time


class Hashes:
    """`content_hash` with a memory in a file.

    A remembered digest counts only while the file's size, inode, and its times of modification and of change of
    inode are the same to the nanosecond; the last of these cannot be set back by a program.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, list[object]] = _read(cache)
        self._new = False

    def __call__(self, path: Path) -> str:
        return content_hash(path, self._digest)

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
