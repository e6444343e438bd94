"""Remembered hashes are used, and never for a file that changed."""

import json
import os
import time
from pathlib import Path

from ubgen.core.stage import content_hash
from ubgen.export.directory import Hashes

LARGE = 17 * 2**20


def write(path: Path, byte: bytes) -> Path:
    path.write_bytes(byte * LARGE)
    return path


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    directory, cache = tmp_path / "weights", tmp_path / "cache.json"
    directory.mkdir()
    (directory / "small.json").write_text("{}", encoding="utf-8")
    file = write(directory / "large.bin", b"a")
    hashes = Hashes(cache)
    assert hashes(directory) == content_hash(directory)
    assert time.time() - file.stat().st_mtime >= 1, "a change in the same tick of the clock would go unseen"
    hashes.save()
    known = json.loads(cache.read_text(encoding="utf-8"))
    assert list(known) == [str(file)]
    known[str(file)][-1] = "remembered"  # only to be seen again when the file is not read
    cache.write_text(json.dumps(known), encoding="utf-8")
    assert Hashes(cache)(file) == "sha256:remembered"


def test_a_change_is_noticed_even_with_the_old_size_and_time(tmp_path: Path) -> None:
    file, hashes = write(tmp_path / "large.bin", b"a"), Hashes(tmp_path / "cache.json")
    before, stat = hashes(file), file.stat()
    write(file, b"b")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes(file) == content_hash(file) != before


def test_a_broken_cache_is_no_cache(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "large.bin", b"a"), tmp_path / "cache.json"
    for broken in ("{", "[]", json.dumps({str(file): ["x"]})):
        cache.write_text(broken, encoding="utf-8")
        assert Hashes(cache)(file) == content_hash(file)
