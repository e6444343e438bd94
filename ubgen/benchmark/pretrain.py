"""`ubgen-bench pretrain`: augmented images per second of the loaders, beside timm's, with the same transforms."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ubgen.benchmark.loaders import OURS, TIMM, sides
from ubgen.benchmark.machine import cpu_seconds, describe, machine_record
from ubgen.benchmark.table import Table, number, write_result
from ubgen.core.errors import UserError
from ubgen.core.probes import Probe
from ubgen.loading.imageset import open_image_set

Say = Callable[[str], None]
_PREFETCHED = 2  # batches for each worker: timm's; the others have fewer


class Turn(NamedTuple):
    """One side in one round."""

    rate: float
    """Images per second."""
    cpu: float
    """Milliseconds of CPU time for an image, over all threads and processes."""


@dataclass
class LoaderBench:
    """Figures of each side and number of workers, one for each round."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    turns: dict[str, dict[int, list[Turn]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Sides that cannot run here, and why."""

    def best(self, side: str) -> tuple[int, float]:
        """The number of workers with the highest median rate, and that median."""
        medians = {
            workers: statistics.median(turn.rate for turn in turns)
            for workers, turns in self.turns[side].items()
        }
        return max(medians.items(), key=lambda item: item[1])

    def ratios(self, side: str, workers: int) -> list[Turn]:
        """How much better than timm's loader at its best number of workers, in each round: above 1 is quicker."""
        base = self.turns[TIMM][self.best(TIMM)[0]]
        return [
            Turn(turn.rate / other.rate, other.cpu / turn.cpu)
            for turn, other in zip(self.turns[side][workers], base, strict=True)
        ]

    def cores_needed(self) -> float:
        """Cores like these that feed `gpus` GPUs, each of which takes `batch` images in `step_seconds`."""
        wanted = self.settings["gpus"] * self.settings["batch"] / self.settings["step_seconds"]
        cpu = statistics.median(turn.cpu for turn in self.turns[OURS][self.best(OURS)[0]])
        return wanted * cpu / 1000

    def tables(self) -> list[Table]:
        columns = ["loader", "workers", "images/s", "against timm", "CPU ms an image", "against timm"]
        title = f"Loaders, {self.settings['image_size']} pixels, whole recipe: {describe(self.machine)}"
        speed = Table(title, columns, text_columns=1, note=self._note())
        for side, by_workers in self.turns.items():
            for workers, turns in by_workers.items():
                rate, cpu = (statistics.median(values) for values in zip(*turns, strict=True))
                rates, cpus = (_spread(values) for values in zip(*self.ratios(side, workers), strict=True))
                speed.rows.append([side, str(workers), number(rate), rates, number(cpu), cpus])
        speed.rows += [[side, reason, "", "", "", ""] for side, reason in self.missing.items()]
        need = Table(
            "Cores that the loader on threads needs", ["GPUs", "batch of each", "seconds per step", "cores"]
        )
        settings = self.settings
        cells = [str(settings["gpus"]), str(settings["batch"]), number(settings["step_seconds"])]
        need.rows.append([*cells, number(self.cores_needed())])
        return [speed, need]

    def _note(self) -> str:
        return (
            f"{self.settings['rounds']} rounds of {self.settings['batches']} batches of {self.settings['batch']}, "
            "in turns; medians. Against timm: how many times as many images, and how many times less CPU time, as its "
            "loader at its best number of workers in the same round; median, and lowest to highest. Workers are "
            "threads, with timm processes.\n"
            "timm posterises to 0 bits as the others do: with Pillow 13 it would stop there.\n"
            f"Versions: {', '.join(f'{name} {version}' for name, version in self.settings['versions'].items())}."
        )

    def write(self, out: Path) -> None:
        """pretrain-loaders.json and pretrain-loaders.md."""
        content = {
            "machine": self.machine,
            "settings": self.settings,
            "turns": {
                side: {count: [turn._asdict() for turn in turns] for count, turns in by_workers.items()}
                for side, by_workers in self.turns.items()
            },
            "missing": self.missing,
        }
        write_result(out, "pretrain-loaders", content, self.tables())


def bench_pretrain(
    data: str | Path,
    *,
    image_size: int = 224,
    batch: int = 64,
    batches: int = 20,
    workers: Sequence[int] = (1, 2, 4),
    rounds: int = 5,
    gpus: int = 8,
    step_seconds: float = 0.1,
    say: Say = lambda line: None,
) -> LoaderBench:
    """Every side and number of workers in turn, `rounds` times after one that does not count."""
    training = open_image_set(data)
    if len(training) < 2 * batch:
        raise UserError(
            f"{training.store} has {len(training)} images; at least two batches of {batch} are needed"
        )
    settings = {
        "data": str(training.store),
        "images": len(training),
        "image_size": image_size,
        "batch": batch,
        "batches": batches,
        "rounds": rounds,
        "gpus": gpus,
        "step_seconds": step_seconds,
        "versions": _versions(),
    }
    result = LoaderBench(settings, machine_record())
    found = sides()
    result.missing = {name: side.detail for name, side in found.items() if isinstance(side, Probe)}
    able = {name: side for name, side in found.items() if not isinstance(side, Probe)}
    result.turns = {name: {count: [] for count in workers} for name in able}
    for turn in range(rounds + 1):
        for count in workers:
            for name, side in _rotated(able, turn).items():
                say(f"round {turn} of {rounds}: {name}, {count} workers")
                measured = _measure(side(training, image_size, batch, count, turn), batches, count)
                if turn:
                    result.turns[name][count].append(measured)
    return result


def _versions() -> dict[str, str]:
    found = {}
    for name in ("timm", "torchvision", "pillow", "simplejpeg", "nvidia-dali-cuda130", "spdl"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _rotated(found: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Another side begins in each round."""
    names = list(found)
    start = turn % len(names)
    return {name: found[name] for name in names[start:] + names[:start]}


def _measure(sizes: Iterator[int], batches: int, workers: int) -> Turn:
    """From when the batches that are loaded ahead are used up."""
    with closing(sizes):  # type: ignore[type-var]  # all are generators
        for _ in islice(sizes, 1 + _PREFETCHED * workers):
            pass
        begun, used = time.perf_counter(), cpu_seconds()
        images = sum(islice(sizes, batches))
        seconds, used = time.perf_counter() - begun, cpu_seconds() - used
    return Turn(images / seconds, 1000 * used / images)
