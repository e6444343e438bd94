"""`ubgen-bench pretrain`: augmented images per second of the loaders, beside timm's, with the same transforms."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ubgen.benchmark.machine import describe, machine_record
from ubgen.benchmark.table import Table, number, write_result
from ubgen.core.errors import UserError
from ubgen.core.probes import dali
from ubgen.dataset import LabelledImages
from ubgen.loading.augment import posterize
from ubgen.loading.imageset import ImageSet, open_image_set
from ubgen.pretrain import Augmentation, training_batches

Say = Callable[[str], None]
OURS, DALI, TIMM = "threads", "DALI", "timm create_loader"


@dataclass
class LoaderBench:
    """Images per second of each side and number of workers, one figure for each round."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def best(self, side: str) -> tuple[int, float]:
        """The number of workers with the highest median, and that median."""
        medians = {workers: statistics.median(rates) for workers, rates in self.rates[side].items()}
        return max(medians.items(), key=lambda item: item[1])

    def cores_needed(self) -> float:
        """Cores like these that feed `gpus` GPUs, each of which takes `batch` images in `step_seconds`."""
        wanted = self.settings["gpus"] * self.settings["batch"] / self.settings["step_seconds"]
        return wanted * self.machine["cores"] / self.best(OURS)[1]

    def tables(self) -> list[Table]:
        speed = Table(
            f"Loaders, {self.settings['image_size']} pixels, whole recipe: {describe(self.machine)}",
            ["loader", "workers", "images/s", "lowest", "highest", f"against {TIMM}"],
            text_columns=1,
            note="\n".join(self.notes),
        )
        base = self.best(TIMM)[1]
        for side, by_workers in self.rates.items():
            for workers, rates in by_workers.items():
                median = statistics.median(rates)
                figures = [number(value) for value in (median, min(rates), max(rates))]
                speed.rows.append([side, str(workers), *figures, f"{median / base:.2f}"])
        need = Table(
            "Cores that the loader on threads needs", ["GPUs", "batch of each", "seconds per step", "cores"]
        )
        settings = self.settings
        cells = [str(settings["gpus"]), str(settings["batch"]), number(settings["step_seconds"])]
        need.rows.append([*cells, number(self.cores_needed())])
        return [speed, need]

    def write(self, out: Path) -> None:
        """pretrain.json and pretrain.md."""
        content = {
            "machine": self.machine,
            "settings": self.settings,
            "rates": self.rates,
            "notes": self.notes,
        }
        write_result(out, "pretrain", content, self.tables())


def bench_pretrain(
    data: str | Path,
    *,
    image_size: int = 224,
    batch: int = 64,
    batches: int = 10,
    workers: Sequence[int] = (1, 2, 4),
    rounds: int = 3,
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
        "image_size": image_size,
        "batch": batch,
        "batches": batches,
        "rounds": rounds,
        "gpus": gpus,
        "step_seconds": step_seconds,
    }
    result = LoaderBench(settings, machine_record())
    sides: dict[str, Callable[[int, int], Iterable[int]]] = {
        OURS: lambda count, epoch: _ours(training, "threads", image_size, batch, count, epoch),
        TIMM: lambda count, epoch: _timm(training, image_size, batch, count),
    }
    if dali().available:
        sides[DALI] = lambda count, epoch: _ours(training, "dali", image_size, batch, count, epoch)
    else:
        result.notes.append(f"No DALI: {dali().detail}")
    result.notes.append("timm posterises to 0 bits as the others do: with Pillow 13 it would stop there.")
    result.rates = {side: {count: [] for count in workers} for side in sides}
    for turn in range(rounds + 1):
        for count in workers:
            for side, start in sides.items():
                say(f"round {turn} of {rounds}: {side}, {count} workers")
                rate = _rate(start(count, turn), batches)
                if turn:
                    result.rates[side][count].append(rate)
    return result


def _rate(sizes: Iterable[int], batches: int) -> float:
    """Images per second after the first batch, with which the loader starts."""
    iterator = iter(sizes)
    next(iterator)
    begun = time.perf_counter()
    images = sum(islice(iterator, batches))
    return images / (time.perf_counter() - begun)


def _ours(
    training: ImageSet, loader: Any, image_size: int, batch: int, count: int, epoch: int
) -> Iterable[int]:
    options = {"batch_size": batch, "image_size": image_size, "threads": count, "loader": loader}
    while True:  # a small dataset is shown again
        for loaded in training_batches(training, epoch=epoch, **options):
            yield len(loaded["labels"])


def _timm(training: ImageSet, image_size: int, batch: int, count: int) -> Iterable[int]:
    from timm.data import create_loader

    recipe = Augmentation()
    loader = create_loader(
        _dataset(training),
        (3, image_size, image_size),
        batch,
        is_training=True,
        use_prefetcher=False,
        re_prob=recipe.erasing,
        re_mode="pixel",
        auto_augment=recipe.rand_augment,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=count,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    for step in loader.dataset.transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
    while True:
        for images, _ in loader:
            yield len(images)


def _dataset(training: ImageSet) -> Any:
    if training.kind == "shards":
        return LabelledImages(training.store)
    if training.kind == "folders":
        from torchvision.datasets import ImageFolder

        return ImageFolder(str(training.store))
    raise UserError(
        f"{training.store}: timm reads no such tars by index; give a dataset of ubgen or an image folder"
    )
