"""One writer at a time in a stage's output directory.

A local directory is locked by the kernel (flock on `.lock`, also over NFS): the lock ends with its process. In object
storage the lock is an object `.lock-1` that names its holder and is rewritten every few seconds. When the holder's
process is gone from this machine, or the object has grown old by the server's clock, the next run creates `.lock-2`.
Object stores can create an object on the condition that it does not exist, so that only one of several runs succeeds.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.files import RemoteStore, Store

LOCK = ".lock"
RENEW = 10.0
"""Seconds between two renewals of a lock object."""
STALE = 45.0
"""Seconds without renewal after which a lock object is dead."""


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
    if not isinstance(store, RemoteStore):
        assert store.local_path is not None
        with _flock(store.local_path, shared):
            yield Hold(not shared)
    elif shared:
        _require_no_holder(store, _server_time(store))
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

    def __init__(self, store: RemoteStore) -> None:
        super().__init__(True)
        self._store = store
        self._token = uuid.uuid4().hex
        self._name = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> "_Lease":
        now = _server_time(self._store)
        dead = _require_no_holder(self._store, now)
        self._name = f"{LOCK}-{1 + max(map(_number, dead), default=0)}"
        if not self._store.create(self._name, self._text()) and not self._is_ours():
            raise _in_use(self._store, _read(self._store, self._name))
        try:
            # a run that saw other locks than this one may have created another name: one of the two sees the other
            for name in _require_no_holder(self._store, now, but=self._name):
                self._store.delete(name)
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._release()

    def check(self) -> None:
        if not self._is_ours():
            raise _in_use(self._store, None)

    def _release(self) -> None:
        with suppress(UserError):  # then it grows old; the work is done all the same
            if self._is_ours():
                self._store.delete(self._name)

    def _renew(self) -> None:
        while not self._done.wait(RENEW):
            with suppress(UserError):  # the store may be back in time
                if not self._is_ours():
                    return
                self._store.write(self._name, self._text())

    def _is_ours(self) -> bool:
        return (_read(self._store, self._name) or {}).get("token") == self._token

    def _text(self) -> bytes:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        return json.dumps({**about, "token": self._token}).encode()


def _require_no_holder(store: RemoteStore, now: float, but: str = "") -> list[str]:
    """Names of the lock objects whose holders are dead; `InUse` if one is alive at `now`, by the server's clock."""
    names = [name for name in store.names() if name.startswith(f"{LOCK}-") and name != but]
    for name in names:
        holder = _read(store, name)
        with suppress(FileNotFoundError):  # given back just now
            if not _process_is_gone(holder) and now - store.modified(name) <= STALE:
                raise _in_use(store, holder)
    return names


def _number(name: str) -> int:
    text = name.removeprefix(f"{LOCK}-")
    return int(text) if text.isdecimal() else 0


def _server_time(store: RemoteStore) -> float:
    """Also finds out now, not after hours of work, whether the directory can be written to."""
    name = f".probe-{uuid.uuid4().hex}"
    store.write(name, b"")
    try:
        return store.modified(name)
    finally:
        store.delete(name)


def _read(store: Store, name: str) -> dict[str, Any] | None:
    """The holder; None if there is none, or nothing that one of us wrote."""
    try:
        holder = json.loads(store.read(name))
        about = {"host": str, "pid": int, "machine": str, "token": str}
        return holder if all(isinstance(holder[field], kind) for field, kind in about.items()) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _process_is_gone(holder: dict[str, Any] | None) -> bool:
    if holder is None or holder["machine"] != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it runs as another user
        return False
    return False


def _machine() -> str:
    """Where a process id means something: this boot of this machine, and in it this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _in_use(store: Store, holder: dict[str, Any] | None) -> InUse:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return InUse(f"output directory in use: {who} is writing to {store}")
