"""Two experiments with the `miniature` recipe: datasets of different origin, and real images beside a plain loop.

    .venv/bin/python bench/pretrain_experiments.py --experiments worlds fashion

bench/results/pretrain.md holds the protocol, which was written before the first run, and the results. Everything is
made below --work with ubgen's own commands. What is finished there is kept, and an interrupted run is continued.
"""

import gzip
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from torch import nn

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_page
from ubgen.core.config import load_recipe
from ubgen.core.files import atomic_write
from ubgen.dataset.images import encode_image
from ubgen.loading.decode import MEAN, STD, EvaluationTransform
from ubgen.loading.imageset import ImageSet, matched, open_image_set
from ubgen.loading.loader import batches_by_threads
from ubgen.miniature.shapes import TRAIN_CLASSES
from ubgen.miniature.world import World, biased_world, fair_world, render_many
from ubgen.pretrain import PretrainConfig

CLASSES = tuple(TRAIN_CLASSES)
QUALITY: dict[str, Any] = {"kind_probabilities": (0.45, 0.0, 0.2, 0.35), "severity_range": (0.0, 0.5)}
WORLDS: dict[str, Callable[[int], World]] = {
    "biased": lambda label: biased_world(classes=(label,)),
    "fair": lambda label: fair_world((label,), **QUALITY),  # the biased world's image quality
}
GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
WEIGHTS = {"EMA": "model_ema.safetensors", "raw": "model.safetensors"}
RESAMPLES = 10_000

PROTOCOL = """## Protocol

Written before the first run. No setting was chosen by these figures.

- Recipe `miniature` as it ships, one thread, float32. Its network, length and augmentation had been changed three times
  by hand before, in sight of the accuracy on 2,000 images of the miniature's world with 20 classes.
- Seeds 1, 2 and 3 of the training run. The images are the same for all seeds. The weights' moving average (EMA) is what
  counts; raw weights are shown, too.
- Median, lowest and highest are those of the seeds. Intervals are 95 % percentiles of a bootstrap over the validation
  images (10,000 draws) of the mean over seeds. They do not cover the choice of the training images.

Worlds: a small ResNet on 2,000 images of the miniature's 10 training classes, 200 of each. (a) images of the biased
world, on which the miniature's generator was trained; (b) images that this generator made from the class names,
without fine-tuning (`ubgen-export`, `ubgen-synth`, no threshold). Both are JPEGs of quality 95. Validation: 1,000
images of the fair world and 1,000 of the biased world, 100 of each class. Their image quality is drawn alike, so they
differ only in whether background and texture follow the class.

Fashion: Fashion-MNIST (Debian's `dataset-fashion-mnist`) as an image folder of 28x28 PNGs: the first 200 training
images of each class, and all 10,000 test images. Peer: a plain loop in the manner of timm's `train.py`, with the same
network, image size, epochs, batch, optimiser, learning rate and schedule: timm's `create_loader` with random crop (50
to 100 % of the area) and flip, cross entropy, weight decay 0.05, no mixup, RandAugment, erasing, label smoothing or
average.
"""


@dataclass(frozen=True)
class Arguments:
    """Pre-train on several datasets and measure."""

    work: Path = Path("runs/pretrain-experiments")
    """Directory of the datasets and the runs."""
    out: Path = Path("bench/results")
    """Directory of the figures."""
    experiments: tuple[Literal["worlds", "fashion"], ...] = ("worlds", "fashion")
    """Which of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the training runs."""
    per_class: int = 200
    """Training images of each class."""
    validation: int = 100
    """Validation images of each class and world."""
    epochs: int | None = None
    """Another length than the recipe's, for a trial of this script."""
    fashion_mnist: Path = Path("/usr/share/datasets/fashion-mnist")
    """Where Debian's package puts the four files."""


def command(name: str, *options: object) -> None:
    """One of ubgen's commands, as a user calls it, on one thread."""
    line = [str(Path(sys.executable).parent / name), *map(str, options)]
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- datasets


def write_folder(root: Path, images: Iterator[tuple[str, str, bytes]]) -> Path:
    """An image folder of (class, file name, content); one that is complete is left as it is."""
    done = root.with_name(f"{root.name}.done")
    if not done.exists():
        for label, name, content in images:
            (root / label).mkdir(parents=True, exist_ok=True)
            (root / label / name).write_bytes(content)
        done.touch()
    return root


def world_images(world: str, per_class: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """JPEGs of a world; each class has a seed of its own."""
    for label, name in enumerate(CLASSES):
        for i, pixels in enumerate(render_many(WORLDS[world](label), per_class, seed + label)[0]):
            yield name, f"{i:05d}.jpg", encode_image(pixels, "jpg")


def fashion_images(source: Path, part: str, per_class: int | None) -> Iterator[tuple[str, str, bytes]]:
    """PNGs of Fashion-MNIST, the first `per_class` of each class."""
    with gzip.open(source / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(source / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for label, name in enumerate(GARMENTS):
        for i in np.flatnonzero(labels == label)[:per_class]:
            yield name, f"{i:05d}.png", png(images[i])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def generated(work: Path, per_class: int) -> Path:
    """The base generator's dataset, by ubgen's commands."""
    command("ubgen-export", "--spec", "miniature", "--out", work / "engine")
    command(
        "ubgen-synth", "--engine", work / "engine", "--classes", "miniature", "--per-class", per_class,
        "--seed", 7, "--out", work / "generated",
    )  # fmt: skip
    return work / "generated"


# --- training


def recipe() -> PretrainConfig:
    return load_recipe("miniature", PretrainConfig, "pretrain")


def pretrain(data: Path, out: Path, seed: int, given: Arguments, validation: Path | None = None) -> Path:
    """`ubgen-pretrain` with the recipe; a finished run stays."""
    options = ["--val", validation] if validation else []
    options += ["--epochs", given.epochs, "--warmup-epochs", 1] if given.epochs else []
    command(
        "ubgen-pretrain", "--recipe", "miniature", "--data", data, "--seed", seed, "--threads", 1,
        "--out", out, *options,
    )  # fmt: skip
    return out


def plain_loop(data: Path, out: Path, seed: int, given: Arguments) -> Path:
    """What one writes with timm alone; saves the weights as ubgen-pretrain does, so that they are measured alike."""
    if (out / "config.json").exists():
        return out
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import random_seed
    from torchvision.datasets import ImageFolder

    config, dataset = recipe(), ImageFolder(str(data))
    epochs, warmup = (given.epochs, 1) if given.epochs else (config.epochs, config.warmup_epochs)
    random_seed(seed)
    torch.set_num_threads(1)
    model = timm.create_model(config.model, num_classes=len(dataset.classes))
    loader = create_loader(
        dataset, (3, config.image_size, config.image_size), config.batch_size, is_training=True,
        use_prefetcher=False, re_prob=0.0, color_jitter=None, auto_augment=None, scale=(0.5, 1.0),
        interpolation="bicubic", mean=MEAN, std=STD, num_workers=1, persistent_workers=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs - warmup, min_lr=config.min_lr, warmup_lr=0.0,
        warmup_epochs=warmup, warmup_prefix=True, step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    done = 0
    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            scheduler.step_update(done)
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        print(f"plain loop, seed {seed}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
    from safetensors.torch import save

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / WEIGHTS["raw"], save(model.state_dict(), metadata={"format": "pt"}))
    content = {"architecture": config.model, "timm": {"num_classes": len(dataset.classes)}}
    atomic_write(out / "config.json", json.dumps({**content, "class_ids": dataset.classes}) + "\n")
    return out


# --- measuring


def correct(run: Path, kind: str, validation: Path, given: Arguments) -> np.ndarray:
    """(N,) whether each validation image is classified rightly, by the weights as timm loads them."""
    content, config = json.loads((run / "config.json").read_text()), recipe()
    model = timm.create_model(
        content["architecture"], **content["timm"], checkpoint_path=str(run / WEIGHTS[kind])
    ).eval()
    data = in_order_of(content["class_ids"], open_image_set(validation))
    transform = EvaluationTransform(config.image_size, config.crop_ratio)
    found = np.empty(len(data), bool)
    with torch.inference_mode():
        start = 0
        for batch in batches_by_threads(data, np.arange(len(data)), transform, 100, lambda i: i, 1):
            right = model(batch["images"]).argmax(1) == batch["labels"]
            found[start : start + len(right)] = right.numpy()
            start += len(right)
    return found


def in_order_of(class_ids: list[str], data: ImageSet) -> ImageSet:
    """`data` with labels that count in the network's classes."""
    return matched(data, replace(data, class_ids=tuple(class_ids)))


def interval(values_N: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = [values_N[rng.integers(0, len(values_N), len(values_N))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def figures(correct_SN: np.ndarray) -> dict[str, Any]:
    """Percent: each seed, and the interval of the mean over seeds."""
    low, high = interval(100 * correct_SN.mean(0))
    return {"seeds": [float(100 * row.mean()) for row in correct_SN], "interval": [low, high]}


def worlds(given: Arguments) -> dict[str, Any]:
    work = given.work / "worlds"
    work.mkdir(parents=True, exist_ok=True)
    fair = write_folder(work / "val-fair", world_images("fair", given.validation, 5200))
    biased = write_folder(work / "val-biased", world_images("biased", given.validation, 5300))
    sets = {
        "biased world": write_folder(work / "biased-world", world_images("biased", given.per_class, 5100)),
        "generated": generated(work, given.per_class),
    }
    runs: dict[str, list[Path]] = {name: [] for name in sets}
    for seed in given.seeds:
        for name, data in sets.items():
            runs[name].append(
                pretrain(data, work / f"backbone-{name.replace(' ', '-')}-{seed}", seed, given, fair)
            )
    result: dict[str, Any] = {}
    hits = {
        (name, kind, where): np.stack([correct(run, kind, path, given) for run in runs[name]])
        for name in sets
        for kind in WEIGHTS
        for where, path in (("fair", fair), ("biased", biased))
    }
    for name in sets:
        for kind in WEIGHTS:
            result[f"{name}, {kind}"] = {
                where: figures(hits[name, kind, where]) for where in ("fair", "biased")
            }
    for where in ("fair", "biased"):
        gain = hits["generated", "EMA", where] - 1.0 * hits["biased world", "EMA", where]
        result.setdefault("generated minus biased world, EMA", {})[where] = figures(gain)
    return result


def fashion(given: Arguments) -> dict[str, Any]:
    work = given.work / "fashion"
    work.mkdir(parents=True, exist_ok=True)
    source = given.fashion_mnist
    train = write_folder(work / "train", fashion_images(source, "train", given.per_class))
    test = write_folder(work / "test", fashion_images(source, "t10k", None))
    ours, plain = [], []
    for seed in given.seeds:
        ours.append(pretrain(train, work / f"backbone-{seed}", seed, given))
        plain.append(plain_loop(train, work / f"plain-{seed}", seed, given))
    sides = {
        "ubgen-pretrain, EMA": (ours, "EMA"),
        "ubgen-pretrain, raw": (ours, "raw"),
        "plain loop": (plain, "raw"),
    }
    return {
        name: {"test": figures(np.stack([correct(run, kind, test, given) for run in runs]))}
        for name, (runs, kind) in sides.items()
    }


# --- report


def table(title: str, rows: dict[str, dict[str, Any]], validation: list[str]) -> Table:
    columns = ["backbone", "validation", "median", "lowest", "highest", "mean, 95 % interval"]
    made = Table(title, columns, text_columns=2)
    for name, row in rows.items():
        for where in validation:
            seeds, (low, high) = row[where]["seeds"], row[where]["interval"]
            cells = [f"{value:.1f}" for value in (statistics.median(seeds), min(seeds), max(seeds))]
            made.rows.append([name, where, *cells, f"{statistics.mean(seeds):.1f}, {low:.1f} to {high:.1f}"])
    return made


TITLES = {
    "worlds": ("Accuracy after training on each dataset (%)", ["fair", "biased"]),
    "fashion": ("Fashion-MNIST, 2,000 training images: test accuracy (%)", ["test"]),
}


def report(results: dict[str, Any]) -> str:
    parts = [
        table(TITLES[name][0], results[name], TITLES[name][1]).markdown()
        for name in TITLES
        if name in results
    ]
    machine = describe(results["machine"]) if "machine" in results else ""
    head = "# Pre-training on small datasets\n\nMade by `bench/pretrain_experiments.py`. " + machine
    return "\n".join([head.rstrip() + "\n", PROTOCOL, *parts])


def main() -> None:
    given = tyro.cli(Arguments, prog="bench/pretrain_experiments.py")
    file = given.out / "pretrain.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in given.experiments:
        results[name] = {"worlds": worlds, "fashion": fashion}[name](given)
        results["machine"] = machine_record()
        write(given.out, results)


def write(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "pretrain.json", json.dumps(results, indent=1) + "\n")
    write_page(out / "pretrain.md", report(results))


if __name__ == "__main__":
    main()
