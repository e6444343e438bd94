"""`ubgen-bench synth`: images on disk per second, beside the bare loop of the same engines and diffusers' pipeline."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ubgen.benchmark.machine import describe, machine_record, peak_by_device
from ubgen.benchmark.peers import check_against, load_peers, missing_weights
from ubgen.benchmark.table import Table, number, write_result
from ubgen.core.classes import load_classes
from ubgen.core.config import require_directory
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.runtime import EngineSet, Signature, load
from ubgen.runtime.backends import parse_device
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Generator, open_engine
from ubgen.synth.plan import Item, Plan
from ubgen.synth.synthesise import synthesise

OURS = "ubgen-synth"
AGAINST = ("bare", "diffusers")
Say = Callable[[str], None]


@dataclass
class SynthBench:
    """Images per second of each side, one figure for each round; seconds of each stage for an image."""

    engine: Path
    settings: dict[str, Any]
    machine: dict[str, Any]
    rates: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    bottleneck: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rate(self, side: str = OURS) -> float:
        """Median over the rounds."""
        return statistics.median(self.rates[side])

    def projection(self) -> dict[str, float]:
        """Hours for `dataset` images with `gpus` devices like this one, and the sum over the devices."""
        hours = self.settings["dataset"] / self.rate() / 3600
        return {"hours": hours / self.settings["gpus"], "gpu_hours": hours}

    def tables(self) -> list[Table]:
        """Speed, time by stage, projection."""
        return [self._speed(), self._stages(), self._projected()]

    def _speed(self) -> Table:
        table = Table(
            f"Synthesis with {self.engine.name}", ("side", "images/s", f"{OURS} is"), text_columns=1
        )
        for side, rates in self.rates.items():
            ratios = [a / b for a, b in zip(self.rates[OURS], rates, strict=True)]
            ratio = "" if side == OURS else f"{statistics.median(ratios):.3f}x"
            table.rows.append((side, number(self.rate(side)), ratio))
        s = self.settings
        about = (
            f"{s['images']} images a round in batches of {s['batch']}, {s['steps']} steps, guidance {s['guidance']}, "
            f"{s['rounds']} rounds; the sides take turns. Images/s is the median of the rounds; the last column is the "
            "median of the rounds' own ratios, which need not be the ratio of the medians."
        )
        table.note = "\n\n".join([about, describe(self.machine), *self.notes])
        return table

    def _stages(self) -> Table:
        rows: list[Sequence[str]] = [
            (name, number(1000 * seconds), f"{100 * self.bottleneck.get(name, 0.0):.1f} %")
            for name, seconds in self.busy.items()
        ]
        note = "Stages run at the same time. Bottleneck: the share of time in which others waited for one."
        return Table("Time by stage", ("stage", "ms per image", "bottleneck"), rows, 1, note)

    def _projected(self) -> Table:
        whole, s = self.projection(), self.settings
        row = (f"{s['dataset']:,}", str(s["gpus"]), number(whole["hours"]), number(whole["gpu_hours"]))
        note = "At the speed above, with every device as fast as this one."
        return Table("Projection", ("images", "devices", "hours", "device-hours"), [row], 0, note)

    def write(self, out: Path) -> None:
        """synth.json and synth.md into the directory `out`."""
        content = {
            "engine": str(self.engine),
            "machine": self.machine,
            "settings": self.settings,
            "images_per_second": self.rates,
            "busy_seconds_per_image": self.busy,
            "bottleneck_shares": self.bottleneck,
            "projection": self.projection(),
            "notes": self.notes,
        }
        write_result(out, "synth", content, self.tables())


def bench_synth(
    engine: str | Path,
    *,
    images: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    steps: int = 50,
    guidance: float = 2.0,
    rounds: int = 3,
    against: Sequence[str] = AGAINST,
    dataset: int = 1_300_000,
    gpus: int = 1,
    say: Say = lambda line: None,
) -> SynthBench:
    """Make `images` (default: 8 batches) with the engine, `rounds` times, in turns with its peers in one process.

    "bare" is the same loop with nothing around it, results thrown away: once denoise and decode, once with the scorers
    as well, which is what ubgen-synth computes. "diffusers" is
    StableDiffusionPipeline on the same weights, scheduler, steps, guidance and batch, in the UNet's precision; left
    out with a note where the weights are gone. No side's time includes opening the engine and encoding the prompts.
    """
    _check(images=images, batch=batch, rounds=rounds, dataset=dataset, gpus=gpus)
    check_against(against, AGAINST)
    path = require_directory(engine, "--engine")
    device = str(parse_device(device or read_manifest(path, "export")["config"]["spec"]["device"]))
    config = SynthConfig(
        path, "", 0, "", batch=batch or "best", steps=steps, guidance=guidance, device=device
    )
    machine = machine_record(device)
    say("opening the engine")
    with tempfile.TemporaryDirectory(prefix="ubgen-bench-synth-") as scratch, _threads_restored():
        work = _Work(config, Path(scratch), images)
        engines = load(path, device)
        settings = {"key": engines.key, "images": work.plan.images, "batch": work.generator.batch}
        settings |= {"steps": steps, "guidance": guidance, "rounds": rounds, "dataset": dataset, "gpus": gpus}
        result = SynthBench(path, settings, machine)
        sides: dict[str, Callable[[], float]] = {OURS: lambda: work.synthesise(result)}
        if "bare" in against:
            sides["bare loop"] = work.bare
            sides["bare loop, scored"] = partial(work.bare, scored=True)
        if "diffusers" in against:
            if reason := missing_weights(engines):
                result.notes.append(f"Not compared with diffusers: {reason}.")
            else:
                say("loading the weights for diffusers")
                work.open_pipeline(engines)
                sides["diffusers"] = work.diffusers
        _turns(sides, rounds, result, say)
    result.machine["peak_memory"] = peak_by_device(engines.device)
    return result


def _check(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Opening an engine for several batches at a time leaves torch few threads."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _turns(sides: dict[str, Callable[[], float]], rounds: int, result: SynthBench, say: Say) -> None:
    """One round more than is counted; the side that begins changes."""
    order = list(sides)
    result.rates = {name: [] for name in order}
    for index in range(rounds + 1):
        for name in order:
            say(f"{name}, round {index} of {rounds}" if index else f"{name}, warming up")
            rate = sides[name]()
            if index:
                result.rates[name].append(rate)
        if not index:
            result.busy.clear()
            result.bottleneck.clear()
        order = order[1:] + order[:1]
    for name in result.busy:
        result.busy[name] /= rounds * result.settings["images"]
    for name in result.bottleneck:
        result.bottleneck[name] /= rounds


class _Work:
    """The same images for every side: image 0 of as many classes as there are, then image 1, ..."""

    _pipeline: Any = None

    def __init__(self, config: SynthConfig, scratch: Path, images: int | None) -> None:
        manifest = read_manifest(config.engine, "export")
        name = manifest["config"]["spec"]["parity"]["classes"]
        classes = load_classes(name)
        if images is None:
            rows = Signature.from_dict(manifest["engine"]["networks"]["unet"]["signature"]).batch.best
            images = 8 * (rows if config.batch == "best" else config.batch)
        per_class = -(-images // len(classes))
        whole = per_class * len(classes)
        self.plan = Plan(classes, classes.names, per_class, whole)
        self._config = replace(config, classes=name, per_class=per_class, shard_size=whole)
        self._threads = torch.get_num_threads()
        self._scratch = scratch
        self._runs = 0
        with torch.inference_mode():
            self.generator: Generator = open_engine(
                self._config, self.plan, self._config.resolved_device(), self._threads
            )

    def synthesise(self, result: SynthBench) -> float:
        """Images a second, from the first noise to the last byte on the disk."""
        self._runs += 1
        config = replace(self._config, out=str(self._scratch / f"run-{self._runs}"))
        synthesise(config, open_source=lambda *_: self.generator)
        speed = read_manifest(config.out, "synth")["speed"]
        for mine, theirs in (
            (result.busy, speed["busy_seconds"]),
            (result.bottleneck, speed["bottleneck_shares"]),
        ):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
        return self.plan.images / speed["worker_seconds"]

    def bare(self, scored: bool = False) -> float:
        """As many batches at a time as in ubgen-synth."""
        start = time.perf_counter()
        with ThreadPoolExecutor(self.generator.concurrency) as pool:
            list(pool.map(partial(self._one, scored=scored), self._batches()))
        return self._rate(start)

    @torch.inference_mode()
    def _one(self, items: list[Item], scored: bool) -> None:
        latents = self.generator.denoise(items)
        pixels = self.generator.decode(latents)
        if scored:
            self.generator.score(items, latents, pixels)

    def open_pipeline(self, engines: EngineSet) -> None:
        self._pipeline = load_peers(engines).pipeline
        self._pipeline.to(dtype=self._pipeline.unet.dtype)  # it casts nothing between its networks

    def diffusers(self) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)  # all cores, which ubgen gives to batches of their own
        start = time.perf_counter()
        try:
            for items in self._batches():
                self._one_of_diffusers(items)
            return self._rate(start)
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def _one_of_diffusers(self, items: list[Item]) -> None:
        noise = self.generator.noise(items)[: len(items)]
        self._pipeline(
            prompt=[self.plan.prompts[item.class_index] for item in items],
            negative_prompt=[""] * len(items),
            latents=noise.to(self.generator.device, self._pipeline.unet.dtype),
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance,
            output_type="np",
        )

    def _batches(self) -> list[list[Item]]:
        items = list(self.plan.shard_items(0))
        size = self.generator.batch
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _rate(self, start: float) -> float:
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize(self.generator.device)
        return self.plan.images / (time.perf_counter() - start)
