"""Worker processes that are killed: `python dying_workers.py ROOT [unanswered]`.

One worker is killed after its first shard; two continue, of which one kills itself when it has denoised two batches and
another takes its place. Then a run whose parts continue what one worker began, and one all of whose workers kill
themselves at once. With `unanswered` only a run one of whose workers kills itself when it has asked for a shard and is
not answered yet. Prints one JSON object: what was said, and how the runs ended. ROOT gets `engine`, and a directory for
each run.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import torch
from killed_runs import FromIdentities, config, no_engine

from ubgen.core.errors import UserError
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Scored
from ubgen.synth.plan import Item
from ubgen.synth.synthesise import synthesise

ROOT = Path(sys.argv[1])
ENGINE, DEAD, ASKED = ROOT / "engine", ROOT / "dead", ROOT / "dead-asked"


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesOnce(FromIdentities):
    """The first worker that has denoised two batches."""

    def __init__(self) -> None:
        self._denoised = 0

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        self._denoised += 1
        if self._denoised > 2:
            try:
                DEAD.touch(exist_ok=False)
                kill_me()
            except FileExistsError:
                pass
        return super().denoise(items)


class DiesWaiting(FromIdentities):
    """The first worker that has made a batch, two seconds after its last: it has asked for a shard and got none."""

    concurrency = 1

    def __init__(self) -> None:
        self._death: threading.Timer | None = None

    def score(self, items: Sequence[Item], latents: torch.Tensor, pixels: torch.Tensor) -> Scored:
        if self._death:
            self._death.cancel()
        else:
            try:
                ASKED.touch(exist_ok=False)
            except FileExistsError:
                return super().score(items, latents, pixels)
        self._death = threading.Timer(2.0, kill_me)
        self._death.start()
        return super().score(items, latents, pixels)


class Deaf:
    """Hears of the first images, and then of nothing until a worker is dead."""

    heard = False

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done and not self.heard:
            self.heard = True
            workers = {worker.sentinel: worker for worker in multiprocessing.active_children()}
            for dead in wait(list(workers)):
                workers[dead].join()  # type: ignore[index]


def whole(*_: object) -> FromIdentities:
    return FromIdentities()


def dies_once(*_: object) -> FromIdentities:
    return DiesOnce()


def dies_at_once(*_: object) -> FromIdentities:
    kill_me()
    raise AssertionError("still there")


def dies_waiting(*_: object) -> FromIdentities:
    return DiesWaiting()


def begin(settings: SynthConfig) -> None:
    """In a child that is killed with its first shard on the disk and others begun."""
    child = os.fork()
    if not child:
        there = Path(settings.out)
        synthesise(settings, lambda *_: any(there.glob("shard-*.json")) and kill_me(), open_source=whole)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert list(Path(settings.out).glob("shard-*.json"))


def unanswered() -> None:
    said: list[str] = []
    asking = replace(config(ROOT / "unanswered", ENGINE), workers=2)
    synthesise(asking, progress=Deaf().progress, say=said.append, open_source=dies_waiting)
    print(json.dumps({"unanswered": said}))


def killed() -> None:

    said: list[str] = []
    settings = config(ROOT / "replaced", ENGINE)
    begin(settings)
    result = synthesise(replace(settings, workers=2), say=said.append, open_source=dies_once)

    parts = config(ROOT / "parts", ENGINE)
    begin(parts)
    ended = [synthesise(replace(parts, executor="static", part=f"{i}/2"), open_source=whole) for i in (1, 2)]

    hopeless: list[str] = []
    try:
        dying = replace(config(ROOT / "hopeless", ENGINE), workers=2)
        synthesise(dying, say=hopeless.append, open_source=dies_at_once)
    except UserError as error:
        hopeless.append(f"error: {error}")
    complete = [part.complete for part in ended]
    print(
        json.dumps(
            {
                "said": said,
                "made": result.made,
                "of": result.images,
                "complete": complete,
                "hopeless": hopeless,
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    no_engine(ROOT)
    synthesise(config(ROOT / "undisturbed", ENGINE), open_source=whole)
    unanswered() if sys.argv[2:] else killed()
