"""Local files that appear under their name only when they are whole and on disk."""

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_UMASK = threading.Lock()


def atomic_write(path: Path, data: bytes | memoryview | str) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader or a crash sees the old content or all of the new."""
    with replacing(Path(path)) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place, on disk, at the end.

    Its name is new each time: were it fixed, two writers of one file could write into each other's.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        file = os.fdopen(descriptor, "wb", buffering=1 << 20)
        try:
            with naming(path):
                os.fchmod(descriptor, 0o666 & ~_umask())
                yield file
                file.flush()
                os.fsync(descriptor)
        finally:
            with suppress(OSError):  # on a full disk, closing tries once more to write what is left
                file.close()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error from writing to an open file does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _umask() -> int:
    with _UMASK:  # it can only be read by setting it: two threads at once could leave it at zero
        mask = os.umask(0)
        os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """The rename itself survives a power cut only once the directory is on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
