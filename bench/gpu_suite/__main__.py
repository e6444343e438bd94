"""The GPU suite: `bench/gpu_suite.sh OUT_DIR [--cpu]`.

Every part runs in a process of its own with a time limit, so that a part that fails, hangs or crashes costs the others
nothing; its results are on disk as they come. What has to be compiled is compiled while kernels are built and tests
run; from then on one part at a time uses the machine.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.gpu_suite import ceilings, checking, decoding, denoising, finetuning, operations, scoring
from bench.gpu_suite.processes import choose_start, context, die_with_parent, import_libraries
from bench.gpu_suite.report import write_report
from bench.gpu_suite.suite import Settings, Suite

Begin = Callable[[Suite], Any]


@dataclass(frozen=True)
class Part:
    """`begin` compiles, beside the first parts; `run` measures, alone, for at most `seconds`."""

    name: str
    seconds: float
    run: Callable[..., None]
    begin: Begin | None = None


PARTS = (
    Part("build", 90, checking.build),
    Part("tests", 80, checking.tests),
    Part("ceilings", 25, ceilings.run),
    Part("kernels", 30, operations.run),
    Part("denoise", 130, denoising.run, denoising.begin),
    Part("decode", 35, decoding.run, decoding.begin),
    Part("score", 45, scoring.run, scoring.begin),
    Part("train", 70, finetuning.run),
)
FIRST = ("build", "tests")  # what runs beside the compilation
COMPILED_BY = 0.45  # of all the time
PATIENCE = 6  # times as long for the reduced run, which measures no speed and may share its machine


class Running:
    """A part's process, seen from here."""

    def __init__(self, part: Part, settings: Settings, end: float) -> None:
        self.part, self._settings = part, settings
        self._pipe, theirs = context().Pipe()
        self._process = context().Process(target=_child, args=(part, settings, end, theirs))
        self._process.start()
        theirs.close()

    def ready(self, seconds: float) -> bool:
        """Whether it has compiled what it will run."""
        try:
            return self._pipe.poll(max(0.0, seconds)) and bool(self._pipe.recv())
        except (EOFError, OSError):
            return False

    def finish(self, end: float) -> None:
        """Let it measure until `end`, then take what it has written."""
        with contextlib.suppress(OSError):  # it has died; that is said below
            self._pipe.send(end)
        self._process.join(max(0.0, end - time.monotonic()) + 3)
        if self._process.is_alive():
            self.stop("its time was up; what it had measured by then is kept")
        elif self._process.exitcode:
            self._note(f"its process ended with exit code {self._process.exitcode}")

    def stop(self, reason: str) -> None:
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # its workers too; it leads its group
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join()
        self._note(reason)

    def _note(self, reason: str) -> None:
        path = self._settings.work / f"{self.part.name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({"error": reason, **content}), encoding="utf-8")


def _child(part: Part, settings: Settings, end: float, pipe: Connection) -> None:
    os.setpgid(0, 0)
    die_with_parent()
    with (settings.out / "suite.log").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        print(f"--- {part.name}", flush=True)
        suite = Suite(part.name, settings, end)
        suite.run(partial(_begin_and_run, part, pipe))


def _begin_and_run(part: Part, pipe: Connection, suite: Suite) -> None:
    if part.begin is None:
        checking.use_built(suite.settings)
    state = () if part.begin is None else (part.begin(suite),)
    pipe.send(True)
    suite.restart(pipe.recv())
    part.run(suite, *state)


def play(settings: Settings, parts: Sequence[Part]) -> None:
    """All parts, in their order; the results are merged and written again after each."""
    started = time.monotonic()
    compiled_by = started + COMPILED_BY * (settings.end - started)
    beside = [Running(part, settings, compiled_by) for part in parts if part.name in FIRST]
    early = [Running(part, settings, compiled_by) for part in parts if part.begin is not None]

    def finish(running: Running) -> None:
        limit = running.part.seconds * (PATIENCE if settings.small else 1)
        end = min(settings.end, time.monotonic() + limit)
        print(f"{running.part.name}: at most {end - time.monotonic():.0f} s", flush=True)
        running.finish(end)
        write_report(settings, [part.name for part in parts], time.monotonic() - started)

    for running in beside:
        running.ready(60)
        finish(running)
    lost = [running for running in early if not running.ready(compiled_by - time.monotonic())]
    for running in lost:
        running.stop("it was not compiled in time")
    waiting = {running.part.name: running for running in early if running not in lost}
    for part in parts:
        if part.name in waiting:
            finish(waiting.pop(part.name))
        elif part.begin is None and part.name not in FIRST:
            running = Running(part, settings, settings.end)
            running.ready(60)
            finish(running)


def main() -> None:
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "results.md", "suite.log"):
        (given.out / name).unlink(missing_ok=True)
    import_libraries()
    if not given.cpu and not choose_start():
        sys.exit("error: PyTorch finds no CUDA GPU here; `--cpu` makes the reduced run on the CPU")
    names = given.parts.split(",") if given.parts else [part.name for part in PARTS]
    if unknown := set(names) - {part.name for part in PARTS}:
        sys.exit(
            f"error: --parts: there is no part {sorted(unknown)[0]!r}; there is {', '.join(p.name for p in PARTS)}"
        )
    work = Path(tempfile.mkdtemp(prefix="ubgen-gpu-suite-"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    settings = Settings(
        out=given.out.resolve(),
        work=work,
        device="cpu" if given.cpu else "cuda",
        small=given.cpu,
        end=time.monotonic() + given.seconds * (PATIENCE if given.cpu else 1),
        variants=tuple(given.variants.split(",")) if given.variants else (),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))  # and the rest is cleaned up
    try:
        play(settings, [part for part in PARTS if part.name in names])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{(given.out / 'results.md').read_text(encoding='utf-8')}\nwritten to {given.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="results.json, results.md and logs are written here"
    )
    parser.add_argument("--cpu", action="store_true", help="the reduced run: tiny networks on the CPU")
    parser.add_argument("--parts", default="", help="only these, separated by commas")
    parser.add_argument("--variants", default="", help="only these ways to denoise, separated by commas")
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything (default 520)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
