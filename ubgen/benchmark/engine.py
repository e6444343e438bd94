"""`ubgen-bench engine`: every network of an engine, its denoising loop and its pipeline, beside their peers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.benchmark.machine import describe, machine_record, peak_by_device
from ubgen.benchmark.peers import Peers, check_against, load_peers, missing_weights
from ubgen.benchmark.table import Table, number, write_result
from ubgen.benchmark.timing import Timing, compare
from ubgen.benchmark.workload import Workload
from ubgen.core.config import require_directory
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.runtime import load
from ubgen.runtime.pipeline import NETWORKS

AGAINST = ("eager", "compile")
Say = Callable[[str], None]
Side = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One side of one part: a network's name, "denoise" (the loop) or "pipeline" (noise to scored images)."""

    part: str
    side: str
    batch: int
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        own = {"part": self.part, "side": self.side, "batch": self.batch}
        return {**own, **asdict(self.timing), "rows_per_second": self.timing.per_second(self.batch)}


@dataclass(frozen=True)
class EngineBench:
    """What was measured, where, and on what settings; `notes` say what was not, and why."""

    engine: Path
    rows: list[Row]
    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]

    def table(self) -> Table:
        method = "Medians; the sides of a part take turns in one process."
        return Table(
            f"Engine {self.engine.name}",
            ("part", "side", "batch", "ms", "quartiles", "rows/s", "engine is"),
            [self._cells(row) for row in self.rows],
            note="\n".join([describe(self.machine), "", method, *self.notes]),
        )

    def _cells(self, row: Row) -> tuple[str, ...]:
        engine = next(other for other in self.rows if other.part == row.part and other.side == "engine")
        timing = row.timing
        return (
            row.part,
            row.side,
            str(row.batch),
            number(timing.median),
            f"{number(timing.q1)} to {number(timing.q3)}",
            number(timing.per_second(row.batch)),
            "" if row is engine else f"{timing.median / engine.timing.median:.2f}x",
        )

    def write(self, out: Path) -> None:
        """engine.json and engine.md into the directory `out`."""
        content = {
            "engine": str(self.engine),
            "machine": self.machine,
            "settings": self.settings,
            "notes": self.notes,
            "rows": [row.to_dict() for row in self.rows],
        }
        write_result(out, "engine", content, [self.table()])


@torch.no_grad()
def bench_engine(
    engine: str | Path,
    *,
    device: str | None = None,
    batch: int | None = None,
    seconds: float = 10.0,
    against: Sequence[str] = ("eager",),
    steps: int = 50,
    guidance: float = 2.0,
    say: Say = lambda line: None,
) -> EngineBench:
    """Time the engine in the directory `engine` on `device` (default: the one that it was made for).

    Each network runs `batch` rows (default: its best batch), about `seconds` for all sides of a part together.
    `against` holds "eager" (PyTorch and diffusers' pipeline in the engine's precision) and "compile" (the same
    through torch.compile); they need the weights that the engine was made from, and are left out with a note where
    those are gone. UserError when the directory is no engine for this machine, or an option makes no sense.
    """
    _check(batch, seconds, against, steps)
    path = require_directory(engine, "--engine")
    manifest = read_manifest(path, "export")
    engines = load(path, device or manifest["config"]["spec"]["device"])
    say("preparing real inputs")
    work = Workload(engines, batch, steps, guidance)
    notes, peers = list[str](), None
    if against and not (reason := missing_weights(engines)):
        say("loading the weights for PyTorch")
        peers = load_peers(engines)
    elif against:
        notes.append(f"Not compared with {' and '.join(against)}: {reason}.")
    rows = []
    for part, rows_of_part, sides in _parts(work, peers, against):
        say(f"{part}: {', '.join(sides)}")
        timings = compare(
            sides, engines.device, seconds=seconds, least=3 if part in ("denoise", "pipeline") else 5
        )
        rows += [Row(part, side, rows_of_part, timing) for side, timing in timings.items()]
    if peers is not None:
        notes.append(_agreement(work, peers))
    machine = {**machine_record(engines.device), "peak_memory": peak_by_device(engines.device)}
    settings = {"key": engines.key, "steps": steps, "guidance": guidance, "seconds": seconds}
    return EngineBench(path, rows, machine, settings, notes)


def _check(batch: int | None, seconds: float, against: Sequence[str], steps: int) -> None:
    if batch is not None and batch < 1:
        raise UserError(f"--batch must be at least 1, not {batch}")
    if not seconds > 0:
        raise UserError(f"--seconds must be above 0, not {seconds}")
    if steps < 2:
        raise UserError(f"--steps must be at least 2, not {steps}")
    check_against(against, AGAINST)


def _parts(
    work: Workload, peers: Peers | None, against: Sequence[str]
) -> list[tuple[str, int, dict[str, Side]]]:
    """(part, rows, sides), all bound to their inputs."""
    parts = []
    for name in NETWORKS:
        inputs, network = work.inputs[name], work.engines[name]
        sides: dict[str, Side] = {"engine": _bound(network.run, inputs)}
        for side in against if peers else ():
            assert peers is not None
            call = peers.networks[name] if side == "eager" else peers.compiled(name)
            sides[side] = _bound(call, inputs)
        parts.append((name, work.rows[name], sides))
    noise = work.noise()
    loops: dict[str, Side] = {"engine": lambda: work.denoise(noise)}
    pipelines: dict[str, Side] = {"engine": work.scored_images}
    for side in against if peers else ():
        assert peers is not None
        loops[side] = _Peer(work, peers, side).latents
        pipelines[side] = _Peer(work, peers, side).scored_images
    return [*parts, ("denoise", work.images, loops), ("pipeline", work.images, pipelines)]


def _bound(call: Callable[[Mapping[str, Tensor]], object], inputs: Mapping[str, Tensor]) -> Side:
    return lambda: call(inputs)


class _Peer:
    """diffusers' pipeline, then decoder and scorers in PyTorch, on the noise and prompts of the workload."""

    def __init__(self, work: Workload, peers: Peers, side: str) -> None:
        self._work, self._peers, self._compile = work, peers, side == "compile"
        self._eager_unet = peers.pipeline.unet
        self._unet = torch.compile(self._eager_unet) if self._compile else self._eager_unet

    def latents(self) -> Tensor:
        work, pipeline, dtype = self._work, self._peers.pipeline, self._eager_unet.dtype
        pipeline.unet = self._unet
        return pipeline(
            prompt_embeds=work.cond.to(dtype),
            negative_prompt_embeds=work.pipeline.uncond.to(dtype).expand_as(work.cond),
            latents=work.noise().to(dtype),
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            output_type="latent",
        ).images

    def scored_images(self) -> np.ndarray:
        """Pixels on the host; the scores are fetched too, as on the engine's side."""
        pixels = self._call("vae_decoder", latents=self.latents().float())
        for name in ("clip_image", "qalign"):
            self._call(name, pixels=pixels).tolist()
        return pixels.cpu().numpy()

    def _call(self, name: str, **inputs: Tensor) -> Tensor:
        call = self._peers.compiled(name) if self._compile else self._peers.networks[name]
        return call(inputs)


def _agreement(work: Workload, peers: Peers) -> str:
    ours = work.scored_images().astype(int)
    theirs = _Peer(work, peers, "eager").scored_images().astype(int)
    share = float((np.abs(ours - theirs) <= 1).mean())
    return f"Pixel values of the two pipelines within one grey level: {share:.3%}."
