"""`ubgen-bench synth`: images on disk per second, beside the bare loop of the same engines and diffusers' pipeline."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ubgen.benchmark.machine import describe, machine_record
from ubgen.benchmark.memory import peak_by_device
from ubgen.benchmark.peers import load_peers, missing_weights
from ubgen.benchmark.table import Table, number
from ubgen.core.classes import load_classes
from ubgen.core.config import require_directory
from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.core.stage import read_manifest
from ubgen.runtime import Signature, load
from ubgen.runtime.backends import parse_device
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Generator, open_engine
from ubgen.synth.plan import Item, Plan
from ubgen.synth.synthesise import synthesise

SIDES = ("bare", "diffusers")
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

    def rate(self, side: str = "ubgen-synth") -> float:
        """Median over the rounds."""
        return statistics.median(self.rates[side])

    def projection(self) -> dict[str, float]:
        """Hours for `dataset` images with `gpus` devices like this one, and the sum over the devices."""
        hours = self.settings["dataset"] / self.rate() / 3600
        return {"hours": hours / self.settings["gpus"], "gpu_hours": hours}

    def table(self) -> Table:
        table = Table(
            f"Synthesis with {self.engine.name}", ("side", "images/s", "ubgen-synth is"), text_columns=1
        )
        for side in self.rates:
            ratios = [a / b for a, b in zip(self.rates["ubgen-synth"], self.rates[side], strict=True)]
            ratio = "" if side == "ubgen-synth" else f"{statistics.median(ratios):.3f}x"
            table.rows.append((side, number(self.rate(side)), ratio))
        s = self.settings
        about = (
            f"{s['images']} images a round in batches of {s['batch']}, {s['steps']} steps, guidance {s['guidance']}, "
            f"{s['rounds']} rounds; the sides take turns. Images/s is the median of the rounds; the last column the "
            "median of the rounds' own ratios, and so not always the ratio of the medians."
        )
        table.note = "\n\n".join([about, describe(self.machine), *self.notes])
        return table

    def stages(self) -> Table:
        table = Table("Time by stage", ("stage", "ms per image", "bottleneck"), text_columns=1)
        for name, seconds in self.busy.items():
            table.rows.append((name, number(1000 * seconds), f"{100 * self.bottleneck.get(name, 0.0):.1f} %"))
        table.note = (
            "Stages run at the same time. Bottleneck: the share of time in which others waited for one."
        )
        return table

    def projected(self) -> Table:
        whole, gpus = self.projection(), self.settings["gpus"]
        table = Table("Projection", ("images", "devices", "hours", "device-hours"), text_columns=0)
        cells = (
            f"{self.settings['dataset']:,}",
            str(gpus),
            number(whole["hours"]),
            number(whole["gpu_hours"]),
        )
        table.rows.append(cells)
        table.note = "At the speed above, with every device as fast as this one."
        return table

    def write(self, out: Path) -> None:
        """synth.json and synth.md into the directory `out`."""
        out.mkdir(parents=True, exist_ok=True)
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
        atomic_write(out / "synth.json", json.dumps(content, indent=2) + "\n")
        text = "\n".join(table.markdown() for table in (self.table(), self.stages(), self.projected()))
        atomic_write(out / "synth.md", text)


def bench_synth(
    engine: str | Path,
    *,
    images: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    steps: int = 50,
    guidance: float = 2.0,
    rounds: int = 3,
    against: Sequence[str] = SIDES,
    dataset: int = 1_300_000,
    gpus: int = 1,
    say: Say = lambda line: None,
) -> SynthBench:
    """Make `images` (default: 8 batches) with the engine, `rounds` times, in turns with its peers in one process.

    "bare" is the same loop with nothing around it: denoise and decode, results thrown away. "diffusers" is
    StableDiffusionPipeline on the same weights, scheduler, steps, guidance and batch, in the UNet's precision; left
    out with a note where the weights are gone. Opening the engine and encoding the prompts is in no side's time.
    """
    _check(images, batch, rounds, against, dataset, gpus)
    path = require_directory(engine, "--engine")
    device = str(parse_device(device or read_manifest(path, "export")["config"]["spec"]["device"]))
    machine = machine_record(device)
    say("opening the engine")
    with tempfile.TemporaryDirectory(prefix="ubgen-bench-synth-") as scratch, _threads_restored():
        work = _Work(path, device, Path(scratch), images, batch, steps, guidance)
        engines = load(path, device)
        settings = {
            "key": engines.key,
            "images": work.images,
            "batch": work.generator.batch,
            "steps": steps,
            "guidance": guidance,
            "rounds": rounds,
            "dataset": dataset,
            "gpus": gpus,
        }
        result = SynthBench(path, settings, machine)
        sides: dict[str, Callable[[], float]] = {"ubgen-synth": lambda: work.synthesise(result)}
        if "bare" in against:
            sides["bare loop"] = work.bare
        if "diffusers" in against:
            if reason := missing_weights(engines):
                result.notes.append(f"Not compared with diffusers: {reason}.")
            else:
                say("loading the weights for diffusers")
                work.pipeline = load_peers(engines).pipeline
                work.pipeline.to(dtype=work.pipeline.unet.dtype)  # it knows no casts between its networks
                sides["diffusers"] = work.diffusers
        _turns(sides, rounds, result, say)
    result.machine["peak_memory"] = peak_by_device(engines.device)
    return result


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
            if index == 1:
                result.busy, result.bottleneck = {}, {}
            rate = sides[name]()
            if index:
                result.rates[name].append(rate)
        order = order[1:] + order[:1]
    made = rounds * result.settings["images"]
    result.busy = {name: seconds / made for name, seconds in result.busy.items()}
    result.bottleneck = {name: share / rounds for name, share in result.bottleneck.items()}


class _Work:
    """The same images for every side: image 0 of as many classes as there are, then image 1, ..."""

    pipeline: Any = None

    def __init__(
        self,
        path: Path,
        device: str,
        scratch: Path,
        images: int | None,
        batch: int | None,
        steps: int,
        guidance: float,
    ) -> None:
        manifest = read_manifest(path, "export")
        classes = manifest["config"]["spec"]["parity"]["classes"]
        found = load_classes(classes)
        best = Signature.from_dict(manifest["engine"]["networks"]["unet"]["signature"]).batch.best
        per_class = -(-(images or 8 * (batch or best)) // len(found))
        self.images = per_class * len(found)
        self.threads = torch.get_num_threads()
        self._scratch = scratch
        self._runs = 0
        self._config = SynthConfig(
            path,
            classes,
            per_class,
            out="",
            batch=batch or "best",
            steps=steps,
            guidance=guidance,
            shard_size=self.images,
            device=device,
        )
        self._plan = Plan(found, found.names, per_class, self.images)
        with torch.inference_mode():
            self.generator: Generator = open_engine(self._config, self._plan, device, self.threads)

    def synthesise(self, result: SynthBench) -> float:
        """Images a second, from the first noise to the last byte on the disk."""
        self._runs += 1
        config = replace(self._config, out=str(self._scratch / f"run-{self._runs}"))
        synthesise(config, open_source=lambda *_: self.generator)
        speed = read_manifest(Path(config.out), "synth")["speed"]
        for name, seconds in speed["busy_seconds"].items():
            result.busy[name] = result.busy.get(name, 0.0) + seconds
        for name, share in speed["bottleneck_shares"].items():
            result.bottleneck[name] = result.bottleneck.get(name, 0.0) + share
        return self.images / speed["worker_seconds"]

    def bare(self) -> float:
        """Like ubgen-synth, with as many batches at a time as the engine was opened for."""
        start = time.perf_counter()
        with ThreadPoolExecutor(self.generator.concurrency) as pool:
            list(pool.map(self._one, self._batches()))
        return self._rate(start)

    @torch.inference_mode()
    def _one(self, items: list[Item]) -> None:
        self.generator.decode(self.generator.denoise(items))

    def diffusers(self) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # all cores, which ubgen gives to batches of their own
        try:
            return self._diffusers()
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def _diffusers(self) -> float:
        names = self._plan.classes.names
        start = time.perf_counter()
        for items in self._batches():
            noise = self.generator.noise(items)[: len(items)]
            self.pipeline(
                prompt=[names[item.class_index] for item in items],
                negative_prompt=[""] * len(items),
                latents=noise.to(self.generator.device, self.pipeline.unet.dtype),
                num_inference_steps=self._config.steps,
                guidance_scale=self._config.guidance,
                output_type="np",
            )
        return self._rate(start)

    def _batches(self) -> list[list[Item]]:
        items = list(self._plan.shard_items(0))
        size = self.generator.batch
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _rate(self, start: float) -> float:
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize(self.generator.device)
        return self.images / (time.perf_counter() - start)


def _check(
    images: int | None, batch: int | None, rounds: int, against: Sequence[str], dataset: int, gpus: int
) -> None:
    for name, value in {
        "images": images,
        "batch": batch,
        "rounds": rounds,
        "dataset": dataset,
        "gpus": gpus,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if unknown := [name for name in against if name not in SIDES]:
        raise UserError(f"--against {unknown[0]}: there is {', '.join(SIDES)}")
