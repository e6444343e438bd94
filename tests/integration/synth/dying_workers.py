"""Worker processes that are killed: `python dying_workers.py ROOT`.

One worker is killed after its first shard; two continue, of which one kills itself when it has denoised two batches and
another takes its place. Then a run all of whose workers kill themselves at once, and one whose parts continue what one
worker began. Prints one JSON object: what was said, and how the runs ended. ROOT gets `engine`, and a directory for
each run.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from killed_runs import FromIdentities, config, no_engine

from ubgen.errors import UserError
from ubgen.synth import SynthConfig, Watch, synthesise
from ubgen.synth.plan import Item

ROOT = Path(sys.argv[1])
ENGINE, DEAD = ROOT / "engine", ROOT / "dead"


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


def whole(*_: object) -> FromIdentities:
    return FromIdentities()


def dies_once(*_: object) -> FromIdentities:
    return DiesOnce()


def dies_at_once(*_: object) -> FromIdentities:
    kill_me()
    raise AssertionError("still there")


def begin(settings: SynthConfig) -> None:
    """In a child that is killed with its first shard on the disk and others begun."""
    child = os.fork()
    if not child:
        there = Path(settings.out)
        synthesise(settings, Watch(lambda done, total: any(there.glob("shard-*.json")) and kill_me()), whole)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert list(Path(settings.out).glob("shard-*.json"))


def main() -> None:
    torch.set_num_threads(1)
    no_engine(ROOT)
    synthesise(config(ROOT / "undisturbed", ENGINE), chain=whole)

    said: list[str] = []
    settings = config(ROOT / "replaced", ENGINE)
    begin(settings)
    result = synthesise(replace(settings, workers=2), Watch(say=said.append), dies_once)

    parts = config(ROOT / "parts", ENGINE)
    begin(parts)
    ended = [synthesise(replace(parts, executor="static", part=f"{i}/2"), chain=whole) for i in (1, 2)]

    hopeless: list[str] = []
    try:
        dying = replace(config(ROOT / "hopeless", ENGINE), workers=2)
        synthesise(dying, Watch(say=hopeless.append), dies_at_once)
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
    main()
