"""Training of Mask R-CNN beside a plain loop in the manner of torchvision's references/detection.

    python -m ubgen.miniature.world --write benchmarks --out runs/benchmarks
    .venv/bin/python bench/dense_speed.py --data runs/benchmarks/coco

Both loops train the same network from the same weights on the same batches, and take turns in one process. The plain
loop is written after torchvision's: CocoDetection with its masks decoded, PIL, a random flip, DataLoader, SGD, a linear
warm-up, every loss read in every update. Writes bench/results/dense-speed.{json,md}.
"""

import math
import random
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from io import StringIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import PartialState
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional as F

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import cpu_seconds, describe
from ubgen.benchmark.table import number, write_result
from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.dense.settings import DenseRecipe, updates_per_epoch
from ubgen.evaluate.dense.tasks import Detection, open_detection
from ubgen.evaluate.dense.training import Stopped, batch_plan, loaded_batches, train

WARM = 10  # updates before the clock starts; also how often ubgen's loop reports
PRINT_EVERY = 20  # updates: torchvision's --print-freq
OURS, PEER = "ubgen", "plain loop"
TRAINING, LOADING = "training", "loading alone"
SEED = 0
Mark = Callable[[int], None]
"""Told how many updates or batches are done."""


@dataclass(frozen=True)
class Arguments:
    """Training of Mask R-CNN beside a plain loop."""

    data: Path
    """Dataset in COCO's layout, such as the miniature's scenes."""
    backbone: str = "random:test_resnet@0"
    """As ubgen-eval takes it."""
    recipe: str = "miniature"
    """Settings of detection, by name or TOML file; float32."""
    updates: int = 30
    """Timed in each turn, after 10 others; a multiple of 10."""
    rounds: int = 7
    """How often each side runs, after one round that does not count."""
    workers: int = 1
    """Loader threads of ubgen, loader processes of the plain loop."""
    out: Path = Path("bench/results")
    """Directory of the figures."""


class Turn(NamedTuple):
    """One side in one round."""

    rate: float
    """Images per second."""
    cpu: float
    """Milliseconds of CPU time for an image, over all threads and processes."""


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    task: Detection
    backbone: Backbone
    process: PartialState
    workers: int
    updates: int

    @property
    def batches(self) -> list[np.ndarray]:
        """Of the first epoch; wide and high images apart, as both loops have it."""
        return batch_plan(
            len(self.task.chosen), self.task.settings.batch_size, SEED, epoch=0, wide=self.task.wide
        )


def train_ours(work: Work, mark: Mark) -> None:
    """As `ubgen-eval detect` does, stopped within the first epoch."""
    with TemporaryDirectory() as out, suppress(Stopped):
        train(
            work.task,
            work.backbone,
            Path(out) / "training",
            {},
            seed=SEED,
            process=work.process,
            threads=work.workers,
            stop_after=work.updates,
            report=lambda done, total, note="": mark(done),
        )


def load_ours(work: Work, mark: Mark) -> None:
    with closing(loaded_batches(work.task, work.batches, SEED, 0, work.workers)) as loaded:
        for done, _ in enumerate(islice(loaded, work.updates), 1):
            mark(done)


class Prepared:
    """Image and annotations -> tensors, and a flip with probability `flip`."""

    def __init__(self, labels: Mapping[int, int], flip: float = 0.5) -> None:
        self.labels, self.flip = labels, flip

    def __call__(self, image: Image.Image, annotations: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        width, height = image.size
        found = [each for each in annotations if not each.get("iscrowd", 0)]
        boxes = torch.as_tensor([each["bbox"] for each in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        masks = [_mask(each["segmentation"], height, width) for each in found]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[each["category_id"]] for each in found], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
        }
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        target = {name: value[keep] for name, value in target.items()}
        if random.random() < self.flip:
            image = F.hflip(image)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
            target["masks"] = target["masks"].flip(-1)
        return F.convert_image_dtype(F.pil_to_tensor(image)), target


def _mask(shape: Any, height: int, width: int) -> Tensor:
    """The parts of an object apart, then together, as torchvision does it."""
    compressed = isinstance(shape, dict) and isinstance(shape["counts"], str | bytes)
    parts = coco_mask.decode(shape if compressed else coco_mask.frPyObjects(shape, height, width))
    mask = torch.as_tensor(parts)
    return mask.any(dim=2) if mask.ndim == 3 else mask


def peer_dataset(task: Detection, flip: float = 0.5) -> Subset[Any]:
    """The images that `task` chose, in its order."""
    data = task.training
    labels = {category: label for label, category in enumerate(data.category_ids, 1)}
    stdout, sys.stdout = sys.stdout, StringIO()  # pycocotools says what it does
    try:
        everything = CocoDetection(str(data.directory), str(data.file), transforms=Prepared(labels, flip))
    finally:
        sys.stdout = stdout
    place = {number: at for at, number in enumerate(everything.ids)}
    return Subset(everything, [place[data.images[index]["id"]] for index in task.chosen])


def peer_loader(work: Work) -> DataLoader[Any]:
    return DataLoader(
        peer_dataset(work.task),
        batch_sampler=[batch.tolist() for batch in work.batches],
        num_workers=work.workers,
        collate_fn=_columns,
    )


def _columns(samples: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


class Meters:
    """Of each figure the last 20 values, and the mean of all."""

    def __init__(self) -> None:
        self.last: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self.total: dict[str, float] = defaultdict(float)
        self.count = 0

    def update(self, values: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in values.items():
            self.last[name].append(value)
            self.total[name] += value

    def __str__(self) -> str:
        return "  ".join(
            f"{name}: {statistics.median(last):.4f} ({self.total[name] / self.count:.4f})"
            for name, last in self.last.items()
        )


def train_plainly(work: Work, mark: Mark) -> None:
    device = work.process.device
    torch.manual_seed(SEED)
    model = work.task.build(work.backbone).to(device)
    optimizer = work.task.optimizer(model)
    loader = peer_loader(work)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=0.001, total_iters=min(1000, len(loader) - 1)
    )
    model.train()
    meters, log, begun = Meters(), StringIO(), time.perf_counter()
    for done, (images, targets) in enumerate(islice(loader, work.updates), 1):
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        losses = model(images, targets)
        loss = sum(losses.values())
        if not math.isfinite(loss.item()):
            raise UserError("the plain loop's loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        read = {name: value.item() for name, value in losses.items()}
        meters.update({"loss": loss.item(), **read, "lr": optimizer.param_groups[0]["lr"]})
        if done % PRINT_EVERY == 0:
            print(f"[{done}/{len(loader)}] {meters} {time.perf_counter() - begun:.1f} s", file=log)
        mark(done)


def load_plainly(work: Work, mark: Mark) -> None:
    for done, _ in enumerate(islice(peer_loader(work), work.updates), 1):
        mark(done)


SIDES: dict[str, dict[str, Callable[[Work, Mark], None]]] = {
    TRAINING: {OURS: train_ours, PEER: train_plainly},
    LOADING: {OURS: load_ours, PEER: load_plainly},
}


def timed(side: Callable[[Work, Mark], None], work: Work) -> Turn:
    """From the end of update 10 to the end of the last one."""
    read: dict[int, tuple[float, float]] = {}

    def mark(done: int) -> None:
        if done in (WARM, work.updates):
            if work.process.device.type == "cuda":
                torch.cuda.synchronize()
            read[done] = time.perf_counter(), cpu_seconds()

    side(work, mark)
    images = (work.updates - WARM) * work.task.settings.batch_size
    seconds, used = (after - before for before, after in zip(read[WARM], read[work.updates], strict=True))
    return Turn(images / seconds, 1000 * used / images)


@dataclass
class Speed:
    """The turns of both sides, of training and of loading alone."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    turns: dict[str, dict[str, list[Turn]]] = field(default_factory=dict)

    def ratios(self, what: str) -> list[Turn]:
        """How much better than the plain loop, round by round: above 1 is quicker, and less CPU time."""
        return [
            Turn(ours.rate / peer.rate, peer.cpu / ours.cpu)
            for ours, peer in zip(self.turns[what][OURS], self.turns[what][PEER], strict=True)
        ]

    def table(self) -> Table:
        columns = ["", "images/s", "plain loop", "ratio", "CPU ms an image", "plain loop", "ratio"]
        table = Table(f"Detection: {describe(self.machine)}", columns, text_columns=1, note=self._note())
        for what, sides in self.turns.items():
            row = [what]
            for name in Turn._fields:
                both = [
                    statistics.median(getattr(turn, name) for turn in sides[side]) for side in (OURS, PEER)
                ]
                ratios = [getattr(each, name) for each in self.ratios(what)]
                middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                row += [*map(number, both), middle]
            table.rows.append(row)
        return table

    def _note(self) -> str:
        given = self.settings
        versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
        return (
            f"`python bench/dense_speed.py`: Mask R-CNN on {given['backbone']}, recipe {given['recipe']}, batches of "
            f"{given['detect']['batch_size']}, shorter side {given['detect']['short_side']}, float32, "
            f"{given['images']} images. {given['rounds']} rounds of {given['updates']} updates after {WARM} others, in "
            "turns; medians. Ratio: how many times as many images, and how many times less CPU time, as the plain loop "
            f"in the same round; median, and lowest to highest. Workers: {given['workers']}, threads of ubgen, "
            "processes of the plain loop.\nThe plain loop follows torchvision's references/detection (PIL, "
            "CocoDetection, DataLoader, every loss read in every update), with the same network, weights, batches and "
            "optimiser. Loading, augmentation, update and log count on both sides; checkpoints, pictures and "
            f"evaluation on neither.\nVersions: {versions}."
        )

    def write(self, out: Path) -> None:
        """dense-speed.json and dense-speed.md."""
        turns = {
            what: {side: [turn._asdict() for turn in each] for side, each in sides.items()}
            for what, sides in self.turns.items()
        }
        content = {"machine": self.machine, "settings": self.settings, "turns": turns}
        write_result(out, "dense-speed", content, [self.table()])


def measure(given: Arguments) -> Speed:
    """Both sides in turn, `rounds` times after one that does not count; another one begins in each round."""
    settings = load_recipe(given.recipe, DenseRecipe, "dense").detect
    if settings.precision != "no":
        raise UserError("bench/dense_speed.py compares in float32: precision must be no")
    if given.updates < 1 or given.updates % WARM or given.rounds < 1:
        raise UserError(f"--updates must be a multiple of {WARM}, and --rounds at least 1")
    [task] = open_detection(given.data, settings, 1.0, [SEED])
    if WARM + given.updates >= updates_per_epoch(len(task.chosen), settings):
        raise UserError(f"{given.data} has too few images for {given.updates} updates within an epoch")
    process = PartialState(cpu=not torch.cuda.is_available())
    backbone = load_backbone(given.backbone, device="cpu", precision="no")
    work = Work(task, backbone, process, given.workers, WARM + given.updates)
    names = ("torchvision", "timm", "pycocotools", "pillow", "simplejpeg")
    about = {
        "backbone": given.backbone,
        "recipe": given.recipe,
        "detect": asdict(settings),
        "images": len(task.chosen),
        "updates": given.updates,
        "rounds": given.rounds,
        "workers": given.workers,
        "versions": {name: metadata.version(name) for name in names},
    }
    result = Speed(about, machine_record(process.device))
    result.turns = {what: {side: [] for side in sides} for what, sides in SIDES.items()}
    for turn in range(given.rounds + 1):
        for what, sides in SIDES.items():
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                measured = timed(sides[name], work)
                if turn:
                    result.turns[what][name].append(measured)
    return result


def main() -> None:
    given = tyro.cli(Arguments, description=__doc__)
    result = measure(given)
    result.write(given.out)
    result.table().show(Console())


if __name__ == "__main__":
    main()
