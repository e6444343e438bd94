"""Runs of ubgen-synth's stage, killed at random moments and begun again: `python killed_runs.py OUT KILLS SEED`.

One process with everything imported forks a child for every run, so that a run costs milliseconds. The networks are
stand-ins whose pictures and scores follow from the identities, some of them not good enough, all a little slow.
Prints one JSON object: how the runs went.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ubgen.core.stage import MANIFEST
from ubgen.diffusion import initial_noise
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Scored
from ubgen.synth.plan import Item
from ubgen.synth.synthesise import synthesise


class FromIdentities:
    """Pictures of noise, and scores made from it."""

    batch = 7
    concurrency = 2
    device = torch.device("cpu")

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        time.sleep(0.004)
        return torch.stack(
            [initial_noise(0, i.class_index, i.image_index, (3, 8, 8), i.attempt) for i in items]
        )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (128 + 40 * latents).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def score(self, items: Sequence[Item], latents: torch.Tensor, pixels: torch.Tensor) -> Scored:
        similarity, quality = latents[:, 0, 0, 0], 3 + latents[:, 1, 0, 0].clamp(-2, 2)
        ones = torch.ones(len(items), dtype=torch.bool)
        return Scored(pixels, similarity, quality, ones, ~ones, latents.flatten(1)[:, :4])


def config(out: Path, engine: Path) -> SynthConfig:
    return SynthConfig(
        engine,
        "miniature",
        per_class=12,
        out=str(out),
        shard_size=16,
        min_similarity=-0.5,
        attempts=3,
        min_quality=2.0,
    )


def no_engine(root: Path) -> Path:
    """An engine's directory whose manifest names no engine."""
    engine = root / "engine"
    engine.mkdir(parents=True)
    about = {"stage": "export", "engine": {"key": "sha256:none"}, "inputs": {}}
    (engine / MANIFEST).write_text(json.dumps(about), encoding="utf-8")
    return engine


def run_in_child(out: Path, engine: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        synthesise(config(out, engine), open_source=lambda *_: FromIdentities())
        status = 0
    finally:
        os._exit(status)


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    engine = no_engine(root)

    start = time.monotonic()
    assert os.waitpid(run_in_child(root / "undisturbed", engine), 0)[1] == 0
    whole = time.monotonic() - start

    chance = random.Random(seed)
    killed = finished = runs = 0
    moments = []
    while killed < kills:
        out = root / f"killed-{finished:03d}"
        child = run_in_child(out, engine)
        moment = chance.uniform(0, whole)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        runs += 1
        if os.WIFSIGNALED(status):
            killed += 1
            moments.append(moment)
        else:
            assert os.WEXITSTATUS(status) == 0
        if (out / MANIFEST).exists():
            finished += 1
    last = root / f"killed-{finished:03d}"
    if last.exists():
        assert os.waitpid(run_in_child(last, engine), 0)[1] == 0
        finished += 1
    print(
        json.dumps({"killed": killed, "datasets": finished, "runs": runs, "whole": whole, "moments": moments})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
