"""A stage's output directory: one writer at a time, `run.json` first, `manifest.json` last.

`run.json` says whose the directory is and which run; a directory without a manifest is unfinished.
"""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ubgen import __version__
from ubgen.core.errors import UserError
from ubgen.core.files import Store, open_store
from ubgen.core.locks import Hold, hold

RUN = "run.json"
MANIFEST = "manifest.json"
_FORMER_MARKS = {"config.json", "export.json", "convert.json"}  # what stages wrote first before run.json
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


def content_hash(
    path: Path, digest: Callable[[Path], str] | None = None, only: Iterable[Path] | None = None
) -> str:
    """ "sha256:<hex>" of a file's bytes, or of a directory's sorted relative file names and their bytes.

    In a directory only hidden files and Markdown are skipped, which no stage reads; where it lies and its times do not
    count. Links are followed, to files and to directories: what counts is what a stage reads. UserError if `path` is
    missing, or a link in it leads nowhere or back to a directory above.
    `digest` stands in for `file_digest`, for a caller that remembers what it has hashed. `only`: of a directory, the
    files below it that count, where a stage reads some of them alone.
    """
    digest = digest or file_digest
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        return f"sha256:{digest(path)}"
    total = hashlib.sha256()
    names = sorted(_files_below(path) if only is None else {str(file.relative_to(path)) for file in only})
    for name in names:
        # the newline and the digest's fixed length keep (name, content) pairs from running into each other
        total.update(f"{name}\n{digest(path / name)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _files_below(root: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """Relative names of the files that a stage may read: not what a download or a version control leaves."""
    above = (*above, root.resolve())
    for path in root.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.resolve() in above:
                raise UserError(f"{path} is a link to a directory above it")
            yield from (f"{path.name}/{name}" for name in _files_below(path, above))
        elif not path.name.endswith(".md"):
            if not path.exists():
                raise UserError(f"{path} is a link to a file that does not exist")
            yield path.name


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: str | Path | Store, *stages: str) -> dict[str, Any]:
    """The manifest of a finished directory of one of `stages` (default: any); UserError if it is missing or broken."""
    store = open_store(directory)
    path = store.address(MANIFEST)
    wanted = f"ubgen {' or '.join(stages) or 'stage'} directory"
    try:
        manifest = json.loads(store.read(MANIFEST).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is unfinished or not a {wanted} (no {MANIFEST} in it)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON; run the stage that made {directory} again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stage"), str):
        raise UserError(f"{path} is not a ubgen manifest; expected a {wanted}")
    if stages and manifest["stage"] not in stages:
        raise UserError(f"{directory} is a ubgen {manifest['stage']} directory; expected a {wanted}")
    return manifest


State = Literal["new", "unfinished", "finished"]


@dataclass
class Stage:
    """One run of a stage in its output directory `out`, a path or URL: whose it is, what differs, what may be cleared.

    `begin` writes `run.json` as the first file: the stage's name and `identity`, all that makes this run this one, by
    the names under which a difference is reported. `finish` writes `manifest.json` as the last. Files whose names begin
    with a dot do not count.

    `config` is recorded and not compared. `owns` are patterns (`fnmatch`) of the files and directories that the stage
    writes: what `begin` clears before a new run. `has_work` says whether an unfinished directory holds anything worth
    keeping; if not, another run takes its place. `overwrite` starts again in a directory of this stage, finished or
    not; None for a stage that has no such option. `shared` lets in other writers that are shared too
    (see `ubgen.core.locks.hold`); such a one can neither clear nor finish the directory.
    """

    out: str | Path | Store
    name: str
    identity: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    owns: Sequence[str] = ()
    has_work: Callable[[Store], bool] = lambda store: True
    overwrite: bool | None = False
    shared: bool = False
    lock: Hold = field(default_factory=lambda: Hold(True), init=False)
    state: State = field(default="new", init=False)
    """What `look` found when the directory was last held."""

    def __post_init__(self) -> None:
        if self.shared and self.overwrite:
            raise ValueError("only one that has the directory alone may overwrite it")
        self.store = open_store(self.out)
        self.identity = json.loads(json.dumps(self.identity, default=str))

    @property
    def path(self) -> Path:
        """The directory, for a stage that needs a local one."""
        if self.store.local_path is None:
            raise UserError(
                f"{self._option} {self.store}: {_command(self.name)} writes to a local directory only"
            )
        return self.store.local_path

    def look(self) -> State:
        """What the directory is to this run; changes nothing.

        "new": empty, or to be cleared. "unfinished": this run, begun. "finished": this very run, to its end.
        UserError when it is not this stage's, or holds another run that is to be kept: it names the first difference.
        """
        if self.store.local_path and self.store.local_path.exists() and not self.store.local_path.is_dir():
            raise UserError(f"{self._option}: {self.store} is not a directory")
        entries = self.store.entries()  # before run.json is read: parts that begin together write that first
        if not entries:
            return "new"
        run = _read_json(self.store, RUN)
        finished = self.store.size(MANIFEST) is not None
        if run is None or run.get("stage") != self.name or not isinstance(run.get("identity"), dict):
            self._require_former(entries, run)
            return "new"
        if self.overwrite:
            return "new"
        difference = first_difference(run["identity"], self.identity)
        if difference is None:
            return "finished" if finished else "unfinished"
        if not finished and not self.shared and not self.has_work(self.store):
            return "new"
        which = "a finished run" if finished else "an unfinished run"
        raise UserError(
            f"{self.store} holds {which} with another configuration ({difference}); {self._advice()}"
        )

    def _require_former(self, entries: Sequence[str], run: Mapping[str, Any] | None) -> None:
        """Without a run.json of this stage, the directory must be finished by a former version, and to be replaced."""
        if (_read_json(self.store, MANIFEST) or {}).get("stage") == self.name:
            if not self.overwrite:
                raise UserError(f"{self.store} was finished by an earlier version of ubgen; {self._advice()}")
        elif (run is not None and "engine key" in run) or _FORMER_MARKS & set(entries):
            raise UserError(
                f"{self._option}: {self.store} was begun by an earlier version of ubgen, whose runs this one cannot "
                f"continue; choose another {self._option}, or remove it"
            )
        else:
            strange = next((name for name in entries if name not in (RUN, MANIFEST)), entries[0])
            raise UserError(
                f"{self._option}: {self.store} is not a directory of {_command(self.name)} (it holds {strange}); "
                "choose an empty or new one"
            )

    def _advice(self) -> str:
        if self.overwrite is None:
            return f"choose another {self._option}"
        return f"use the same, choose another {self._option}, or pass --overwrite to start again"

    @property
    def _option(self) -> str:
        return "OUT" if self.name == "convert" else "--out"

    @contextmanager
    def hold(self) -> Iterator["Stage"]:
        """Keep other writers out while the block runs; the directory stays as it is until `begin`.

        UserError as for `look`, or when the directory is not writable or in use.
        """
        with hold(self.store, shared=self.shared) as self.lock:
            self.state = self.look()
            yield self

    def begin(self) -> None:
        """From here on the directory is this run's, and unfinished; for a stage that has checked all its inputs."""
        if self.shared:
            if self.look() == "new":  # another that is shared may have begun since
                self._write_run()
            return
        self.store.delete_leftovers()
        there = self.store.size(RUN) is not None
        if not there:
            self._write_run()
        if self.store.size(MANIFEST) is not None:
            self.store.delete(MANIFEST)
        if self.state == "new" and there:
            # the former run.json stays until all else is gone: whatever happens meanwhile, the directory is ours
            self._clear()
            self._write_run()
        elif self.state == "new":
            self._clear()

    def _write_run(self) -> None:
        about = {"stage": self.name, "ubgen_version": __version__}
        values = {**about, "identity": self.identity, "config": dict(self.config)}
        self.store.write(RUN, json.dumps(values, indent=1, default=str) + "\n")

    def _clear(self) -> None:
        """The marks of what is whole go first, so that no half result looks like a whole one."""
        names = [n for n in self.store.entries() if any(fnmatchcase(n, pattern) for pattern in self.owns)]
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            if name not in (RUN, MANIFEST):
                self.store.delete(name)

    def finish(
        self, inputs: Mapping[str, Path | str], known: Mapping[str, str] | None = None, /, **extra: Any
    ) -> None:
        """Write the manifest, as the last file: config, versions, device, and the hash of every input.

        `known`: hashes of some of them, found when they were read.
        """
        if not self.lock.exclusive:
            raise RuntimeError("a stage directory that is shared cannot be finished")
        self.store.delete_leftovers()  # of workers that died on the way
        hashes = {
            name: {"path": str(path), "hash": (known or {}).get(name) or content_hash(Path(path))}
            for name, path in inputs.items()
        }
        manifest = {
            "stage": self.name,
            "config": dict(self.config),
            "command": command_line(),
            "ubgen_version": __version__,
            "versions": library_versions(),
            "device": device_name(),
            "inputs": hashes,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **extra,
        }
        self.lock.check()
        self.store.write(MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


_COMMANDS = {
    "convert": "ubgen-dataset convert",
    "benchmarks": "python -m ubgen.miniature.world --write benchmarks",
}


def _command(stage: str) -> str:
    return _COMMANDS.get(stage, f"ubgen-{stage}")


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    """A file's JSON object; None where there is none."""
    try:
        content = json.loads(store.read(name))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_run(directory: str | Path | Store, stage: str) -> dict[str, Any]:
    """The identity of the run of `stage` that `directory` holds, finished or not; UserError if it is of another."""
    run = _read_json(open_store(directory), RUN)
    if run is not None and stage == "synth" and "engine key" in run:
        return run  # of a dataset that an earlier version made
    if run is None or run.get("stage") != stage or not isinstance(run.get("identity"), dict):
        raise UserError(f"{directory} has no {RUN} of {_command(stage)}")
    return run["identity"]


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first value in which two JSON objects differ, as "generator.lr was 1e-05, now 2e-05"; None if equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner: list[tuple[Any, Any, str]] = [
            (old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
            for name in [*old, *(name for name in new if name not in old)]
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [(a, b, f"{key}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    elif isinstance(old, list) and isinstance(new, list):
        return f"{key} had {len(old)} entries, now {len(new)}"
    else:
        return None if old == new else f"{key} was {_short(old)}, now {_short(new)}"
    return next((found for a, b, name in inner if (found := first_difference(a, b, name))), None)


def _short(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return value[:19] + "…"
    return "absent" if value is None else repr(value)


def command_line() -> str | None:
    """How this process was called, "ubgen-synth --engine runs/engine"; None if it is not one of our commands."""
    program = Path(sys.argv[0])
    name = f"ubgen-{program.stem}" if program.parts[-3:-1] == ("ubgen", "cli") else program.name
    return shlex.join([name, *sys.argv[1:]]) if name.startswith("ubgen-") else None


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
