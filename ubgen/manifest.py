"""Stage directories: one writer at a time, and a manifest that is written last and atomically."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ubgen import __version__
from ubgen.atomic import atomic_write as atomic_write
from ubgen.errors import UserError
from ubgen.locks import Hold, hold
from ubgen.storage import Store, open_store

MANIFEST = "manifest.json"
_LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "open_clip_torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
)


def content_hash(path: Path, digest: Callable[[Path], str] | None = None) -> str:
    """ "sha256:<hex>" of a file's bytes, or of a directory's sorted relative file names and their bytes.

    In a directory only hidden files and Markdown are skipped, which no stage reads; where it lies and its times do not
    count. UserError if `path` is missing.
    `digest` stands in for `file_digest`, for a caller that remembers what it has hashed.
    """
    digest = digest or file_digest
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        return f"sha256:{digest(path)}"
    total = hashlib.sha256()
    names = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    for name in sorted(name for name in names if not _unread(name)):
        # the newline and the digest's fixed length keep (name, content) pairs from running into each other
        total.update(f"{name}\n{digest(path / name)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _unread(name: str) -> bool:
    """What a download or a version control leaves in a directory of weights."""
    return name.endswith(".md") or any(part.startswith(".") for part in name.split("/"))


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: str | Path | Store, stage: str | None = None) -> dict[str, Any]:
    """The manifest of a finished stage directory; UserError if it is missing, broken, or of another stage."""
    store = open_store(directory)
    path = store.address(MANIFEST)
    wanted = f"ubgen {stage} directory" if stage else "ubgen stage directory"
    try:
        manifest = json.loads(store.read(MANIFEST).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is unfinished or not a {wanted} (no {MANIFEST} in it)") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(f"{path} is not valid JSON; run the stage that made {directory} again") from None
    if not isinstance(manifest, dict) or "stage" not in manifest:
        raise UserError(f"{path} is not a ubgen manifest; expected a {wanted}")
    if stage and manifest["stage"] != stage:
        raise UserError(f"{directory} is a ubgen {manifest['stage']} directory; expected a {wanted}")
    return manifest


@dataclass
class StageDirectory:
    """A stage's output while it is being written; `finish` makes it readable for the next stage."""

    store: Store
    stage: str
    config: Mapping[str, Any] = field(default_factory=dict)
    lock: Hold = field(default_factory=lambda: Hold(True))

    @property
    def path(self) -> Path:
        """The directory, for a stage that needs a local one."""
        if self.store.local_path is None:
            raise UserError(f"{self.store}: ubgen {self.stage} writes to a local directory only")
        return self.store.local_path

    def begin(self) -> None:
        """From here on the directory is unfinished: its manifest goes, and what killed writers left."""
        if self.lock.exclusive:
            self.store.delete_leftovers()
        if self.store.size(MANIFEST) is not None:
            self.store.delete(MANIFEST)

    def finish(self, inputs: Mapping[str, Path | str], **extra: Any) -> None:
        """Write the manifest, as the last file: config, versions, device, and the hash of every input."""
        if not self.lock.exclusive:
            raise RuntimeError("a stage directory that is shared cannot be finished")
        self.store.delete_leftovers()  # of workers that died on the way
        manifest = {
            "stage": self.stage,
            "config": dict(self.config),
            "ubgen_version": __version__,
            "versions": library_versions(),
            "device": device_name(),
            "inputs": {
                name: {"path": str(path), "hash": content_hash(Path(path))} for name, path in inputs.items()
            },
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **extra,
        }
        self.lock.check()
        self.store.write(MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


@contextmanager
def stage_directory(
    out: str | Path | Store,
    stage: str,
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    shared: bool = False,
) -> Iterator[StageDirectory]:
    """`held_directory` that has begun, for a stage that has checked all its inputs by then."""
    with held_directory(out, stage, config, overwrite=overwrite, shared=shared) as held:
        held.begin()
        yield held


@contextmanager
def held_directory(
    out: str | Path | Store,
    stage: str,
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    shared: bool = False,
) -> Iterator[StageDirectory]:
    """Hold `out`, a directory or URL, for one writer while the block runs; it stays as it is until `begin` is called.

    An unfinished directory is handed over as it is, to resume. `overwrite` lets in a finished one too, of which `begin`
    takes only the manifest away; what becomes of its content is the stage's business. `shared` lets in other writers
    that are shared too (see `ubgen.locks.hold`); such a one cannot finish the directory.

    UserError when `out` is not writable, held by another process, or finished and `overwrite` is False.
    """
    if shared and overwrite:
        raise ValueError("only one that has the directory alone may overwrite it")
    store = open_store(out)
    with hold(store, shared=shared) as lock:
        if store.size(MANIFEST) is not None and not overwrite:
            raise UserError(f"{out} is already finished; choose another --out, or pass --overwrite")
        yield StageDirectory(store, stage, config, lock)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name() -> str:
    """The accelerator's name, or the CPU's."""
    import torch  # only here: readers of manifests need not wait for it

    return f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"cpu: {cpu_name()}"


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
