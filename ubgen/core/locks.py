"""One writer at a time in a stage's output directory.

A local directory is locked by the kernel (flock on `.lock`, also over NFS): the lock ends with its process. In object
storage `.lock` is an object that names its holder and is renewed every few seconds; one that is no longer renewed, or
whose process is gone from this machine, is taken over.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.files import Store

LOCK = ".lock"
RENEW = 10.0
"""Seconds between two renewals of a lock object."""
STALE = 45.0
"""Seconds without renewal after which a lock object is dead."""
SETTLE = 1.0
"""Seconds in which of two that take over a dead lock at the same time the first sees the second."""
_mine: set[str] = set()  # tokens of the locks that this process holds


class InUse(UserError):
    """Another holds the directory."""


class Hold:
    """A lock that is held."""

    exclusive: bool = True

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive

    def check(self) -> None:
        """UserError if the lock was lost: another run found it without renewal and took it over."""


@contextmanager
def hold(store: Store, *, shared: bool = False) -> Iterator[Hold]:
    """Keep other writers out of `store` while the block runs.

    `shared` lets in others that are shared too, which must then see to it that they write different files; it keeps
    out, and is kept out by, an exclusive holder. In object storage shared holders leave no trace: one is refused while
    there is an exclusive holder, but does not keep one out.

    UserError when the directory cannot be written to, `InUse` when another holds it.
    """
    if store.local_path is not None:
        with _flock(store.local_path, shared):
            yield Hold(not shared)
    elif shared:
        _probe(store)
        if holder := _live_holder(store):
            raise _in_use(store, holder)
        yield Hold(False)
    else:
        with _Lease(store) as lease:
            yield lease


@contextmanager
def _flock(directory: Path, shared: bool) -> Iterator[None]:
    lock = _open_lock(directory)
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"output directory in use: another process is writing to {directory}") from None
        except OSError as error:  # Lustre without the mount option flock, NFS without its lock daemon
            raise UserError(
                f"output directory {directory}: its file system cannot lock files ({error.strerror}); choose another"
            ) from error
        yield
    finally:
        os.close(lock)  # also releases it; the file stays, since deleting it would let two writers in


def _open_lock(directory: Path) -> int:
    """Opening the lock for writing is also the check that the directory can be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to output directory {directory}: {error.strerror}") from error


class _Lease(Hold):
    """A lock object that a thread renews."""

    def __init__(self, store: Store) -> None:
        super().__init__(True)
        self._store = store
        self._token = uuid.uuid4().hex
        self._taken_by: dict[str, Any] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> "_Lease":
        self._take()
        _mine.add(self._token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        _mine.discard(self._token)
        with suppress(UserError):  # then it goes stale; the work is done all the same
            if self._is_ours(_read(self._store)):
                self._store.delete(LOCK)

    def check(self) -> None:
        if self._taken_by:
            raise _in_use(self._store, self._taken_by)

    def _take(self) -> None:
        if not self._store.create(LOCK, self._text()):
            if holder := _live_holder(self._store):
                raise _in_use(self._store, holder)
            self._store.write(LOCK, self._text())
            time.sleep(SETTLE)
        # another may have taken the dead lock too, or the store cannot create on condition: the last one has it
        if not self._is_ours(holder := _read(self._store)):
            raise _in_use(self._store, holder or {})

    def _renew(self) -> None:
        while not self._done.wait(RENEW):
            with suppress(UserError):  # the store may be back in time
                holder = _read(self._store)
                if holder and not self._is_ours(holder):
                    self._taken_by = holder
                    return
                self._store.write(LOCK, self._text())

    def _is_ours(self, holder: dict[str, Any] | None) -> bool:
        return bool(holder) and holder["token"] == self._token  # type: ignore[index]  # bool() hides it

    def _text(self) -> bytes:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        return json.dumps({**about, "token": self._token, "time": time.time()}).encode()


def _read(store: Store) -> dict[str, Any] | None:
    """The holder; None if there is none, or nothing that one of us wrote."""
    try:
        holder = json.loads(store.read(LOCK))
        about = {"host": str, "pid": int, "machine": str, "token": str, "time": float}
        return holder if all(isinstance(holder[name], kind) for name, kind in about.items()) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _live_holder(store: Store) -> dict[str, Any] | None:
    holder = _read(store)
    if holder is None or _process_is_gone(holder):
        return None
    if abs(time.time() - holder["time"]) <= STALE:
        return holder
    # by its time it is dead; but the clocks of two machines may differ, so see whether it is renewed
    time.sleep(1.5 * RENEW)
    later = _read(store)
    return later if later and later != holder else None


def _process_is_gone(holder: dict[str, Any]) -> bool:
    if holder["machine"] != _machine():
        return False
    if holder["pid"] == os.getpid():
        return holder["token"] not in _mine
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Where a process id means something: this boot of this machine, and in it this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _in_use(store: Store, holder: dict[str, Any]) -> InUse:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return InUse(f"output directory in use: {who} is writing to {store}")


def _probe(store: Store) -> None:
    """Find out now, not after hours of work, whether the directory can be written to."""
    name = f".probe-{uuid.uuid4().hex}"
    store.write(name, b"")
    store.delete(name)
