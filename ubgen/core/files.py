"""Files and flat directories of files, local or behind fsspec (`s3://bucket/prefix`, `gs://…`, `memory://…`).

A file appears under its name only when it is complete: locally by renaming a flushed temporary file, in object storage
because an object exists only once its upload is complete.
"""

import errno
import os
import re
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ubgen.core.errors import UserError, install_extra

T = TypeVar("T")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+(?:::[A-Za-z][A-Za-z0-9+.-]+)*):/+(.*)", re.DOTALL)
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_WAITS = (0.5, 1.0, 2.0)  # seconds before each further try
_OF_A_MOUNT = "lost+found"  # in every fresh file system of Linux
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


class Store(ABC):
    """The plain files of one directory, by name. `url` is the directory as the user would write it.

    Reading what is not there raises FileNotFoundError naming the file. What a remote store refuses, or fails to do
    after a few tries, is a UserError of one line. Stores can be pickled and used in forked processes.
    """

    url: str
    local_path: Path | None = None
    """The directory, if it is a local one."""

    def __str__(self) -> str:
        return self.url

    def address(self, name: str) -> str:
        """Path or URL of a file, for other libraries and for messages."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """Names of the plain files, sorted; none if the directory does not exist."""
        return sorted(self.sizes())

    def entries(self) -> list[str]:
        """Names of all that lies here, sorted, without hidden files; of a local directory with its subdirectories."""
        return [name for name in self.names() if not name.startswith(".")]

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Size in bytes of every plain file, by name, from one listing."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Size in bytes; None if there is no such file."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, fewer where the file ends earlier."""

    def read_starts(self, names: Sequence[str], count: int) -> list[bytes]:
        """The first `count` bytes of each file; b"" for one that is not there. Quick for thousands of files."""
        return [self._start_or_nothing(name, count) for name in names]

    def _start_or_nothing(self, name: str, count: int) -> bytes:
        try:
            return self.read_range(name, 0, count)
        except FileNotFoundError:
            return b""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A seekable file to read from."""

    @abstractmethod
    def write(self, name: str, data: bytes | str) -> None:
        """Write a file (text as UTF-8), or replace it; a reader sees the old content or all of the new."""

    @abstractmethod
    def new_file(self, name: str) -> Any:
        """Context manager that gives a local file to write to; leaving it puts the file in place under `name`.

        After an exception nothing is put in place. The file grows beside its target in a local directory, and in the
        system's temporary directory (TMPDIR) for a remote one.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, or a local directory with all that is in it; it may be missing."""

    @abstractmethod
    def delete_leftovers(self) -> None:
        """Delete what killed writers left under temporary names. Only while no other process writes here."""


def open_store(where: "str | Path | Store") -> Store:
    """The directory at `where`: a path, or a URL of any protocol that fsspec knows.

    For S3, credentials and endpoint come from the usual AWS environment variables and files (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3 for another S3 server, ...). A server
    that does not answer is tried again for one to two minutes; AWS_MAX_ATTEMPTS makes that shorter or longer.
    UserError when nothing installed knows the protocol.
    """
    if isinstance(where, Store):
        return where
    if not (match := _URL.fullmatch(str(where))):
        return LocalStore(Path(where))
    protocol, rest = match.groups()
    if protocol in ("file", "local"):
        return LocalStore(Path("/" + rest))
    return RemoteStore(f"{protocol}://{rest.rstrip('/')}")


class LocalStore(Store):
    """A directory of the file system. Its OSErrors name the file."""

    def __init__(self, path: Path) -> None:
        self.local_path: Path = path
        self.url = str(path)

    def address(self, name: str) -> str:
        return str(self.local_path / name)

    def sizes(self) -> dict[str, int]:
        found = {}
        try:
            with os.scandir(self.local_path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # taken away meanwhile
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def entries(self) -> list[str]:
        try:
            names = os.listdir(self.local_path)
            return sorted(name for name in names if not name.startswith(".") and name != _OF_A_MOUNT)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        try:
            return (self.local_path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        return (self.local_path / name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with (self.local_path / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)

    def open(self, name: str) -> BinaryIO:
        return (self.local_path / name).open("rb")

    def write(self, name: str, data: bytes | str) -> None:
        atomic_write(self.local_path / name, data)

    def new_file(self, name: str) -> Any:
        return replacing(self.local_path / name)

    def delete(self, name: str) -> None:
        path = self.local_path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def delete_leftovers(self) -> None:
        for name in self.sizes():
            if _TEMPORARY.fullmatch(name):
                self.delete(name)


class RemoteStore(Store):
    """A directory behind fsspec. Nothing is listed from a cache: other machines write here too."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: tuple[int, Any, str] | None = None
        self._connect()

    def __reduce__(self) -> Any:
        return RemoteStore, (self.url,)

    def _connect(self) -> tuple[Any, str]:
        """File system and root path; a new connection in each process, since sockets do not survive a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                system, root = url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                raise UserError(_missing_package(self.url, error)) from None
            except ValueError as error:
                raise UserError(f"{self.url}: {_one_line(error)}") from None
            self._connection = (os.getpid(), system, root.rstrip("/"))
        return self._connection[1], self._connection[2]

    def _call(self, method: str, name: str, *args: Any, **options: Any) -> Any:
        system, root = self._connect()
        path = f"{root}/{name}" if name else root
        return getattr(system, method)(path, *args, **options)

    def _try(self, doing: str, name: str, action: Callable[[], T]) -> T:
        """`action`, again after a while where the failure may pass; FileNotFoundError is the caller's."""
        for wait in (*_WAITS, None):
            try:
                return action()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # every protocol has its own
                failure = error
                if wait is None or _is_final(error):
                    break
                time.sleep(wait)
        raise UserError(f"{self.address(name)}: cannot {doing} ({_one_line(failure)})") from failure

    def sizes(self) -> dict[str, int]:
        try:
            entries = self._try("list", "", lambda: self._call("ls", "", detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        root = self._connect()[1]
        found = {}
        for entry in entries:
            path = str(entry["name"]).rstrip("/")
            if entry["type"] == "file" and path != root:  # some tools leave an empty object for the directory
                found[path.rpartition("/")[2]] = int(entry["size"] or 0)
        return found

    def size(self, name: str) -> int | None:
        try:
            return int(self._try("look at", name, lambda: self._call("info", name))["size"])
        except FileNotFoundError:
            return None

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds by the server's clock; 0 if the protocol does not say."""

        def read() -> float:
            with suppress(NotImplementedError):
                return self._call("modified", name).timestamp()
            return 0.0

        return self._try("look at", name, read)

    def read(self, name: str) -> bytes:
        return self._named(name, lambda: self._try("read", name, lambda: self._call("cat_file", name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        def read() -> bytes:
            try:
                return self._call("cat_file", name, start=start, end=stop)
            except OSError as error:
                if error.errno == errno.EINVAL and self._call("info", name)["size"] <= start:
                    return b""  # S3 refuses to read nothing
                raise

        return self._named(name, lambda: self._try("read", name, read))

    def read_starts(self, names: Sequence[str], count: int) -> list[bytes]:
        def read() -> list[Any]:
            system, root = self._connect()
            paths = [f"{root}/{name}" for name in names]
            return system.cat_ranges(paths, [0] * len(paths), [count] * len(paths), on_error="return")

        starts = self._try("read", "", read) if names else []
        # one of a thousand requests may fail where all the others went through
        return [
            start if isinstance(start, bytes) else self._start_or_nothing(name, count)
            for name, start in zip(names, starts, strict=True)
        ]

    def open(self, name: str) -> BinaryIO:
        return self._named(name, lambda: self._try("open", name, lambda: self._call("open", name, "rb")))

    def write(self, name: str, data: bytes | str) -> None:
        payload = data.encode() if isinstance(data, str) else data
        self._put(name, lambda: self._call("pipe_file", name, payload))

    @contextmanager
    def new_file(self, name: str) -> Iterator[BinaryIO]:
        directory = tempfile.gettempdir()
        # without a name, it goes even if this process is killed
        with tempfile.TemporaryFile(dir=directory, buffering=1 << 20) as file:
            with naming(Path(directory)):
                yield file  # type: ignore[misc]  # a wrapper of a BinaryIO
                file.flush()
            file.seek(0)
            self._put(name, lambda: self._upload(f"/dev/fd/{file.fileno()}", name))

    def _upload(self, local: str, name: str) -> None:
        system, root = self._connect()
        system.put_file(local, f"{root}/{name}")

    def _put(self, name: str, action: Callable[[], Any]) -> None:
        try:
            self._try("write", name, action)
        except FileNotFoundError as error:  # no such bucket
            raise UserError(f"{self.address(name)}: cannot write ({_one_line(error)})") from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False if it does.

        Two that try at the same time cannot both succeed where the store can write on condition (S3, GCS).
        """
        try:
            self._put(name, lambda: self._create(name, data))
        except FileExistsError:
            return False
        return True

    def _create(self, name: str, data: bytes) -> None:
        try:
            self._call("pipe_file", name, data, mode="create")
        except (NotImplementedError, TypeError):  # cannot write on condition
            if self._call("exists", name):
                raise FileExistsError(name) from None
            self._call("pipe_file", name, data)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._try("delete", name, lambda: self._call("rm_file", name))

    def delete_leftovers(self) -> None:
        pass  # an upload that broke off leaves no object

    def _named(self, name: str, action: Callable[[], T]) -> T:
        """fsspec's FileNotFoundError does not always say which file."""
        try:
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", self.address(name)) from None


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: not allowed, or a wrong request."""
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EINVAL) or isinstance(error, PermissionError)
    return isinstance(error, NotImplementedError | ValueError | TypeError)


def _missing_package(url: str, error: ImportError) -> str:
    extra = _EXTRAS.get(url.partition(":")[0])
    return f"{url}: {install_extra(extra)}" if extra else f"{url}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def cache_directory(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/ubgen/<parts>` (default ~/.cache/ubgen/<parts>), made if it is missing.

    For files that only save time: they may be deleted whenever nothing runs.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root, "ubgen", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
