"""What `make reproduce` runs: arms, sizes, and the commands in their order (PROTOCOL.md)."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ubgen.core.stage import MANIFEST
from ubgen.dataset.images import encode_image
from ubgen.loading.decode import decode
from ubgen.loading.imageset import open_image_set

EQ8 = "miniature-eq8"
ARMS: dict[str, tuple[str, ...]] = {
    "real": (),
    "base": (),
    "eq8": ("--recipe", EQ8),
    "recommended": ("--recipe", "miniature"),
    "no-entire": ("--recipe", EQ8, "--losses.entire", "0"),
    "no-individual": ("--recipe", EQ8, "--losses.individual", "0"),
    "no-quality": ("--recipe", EQ8, "--losses.quality", "0"),
}
"""The options of `ubgen-train`; none for images that no fine-tuned generator made."""
MAIN = ("real", "base", "eq8", "recommended")
MODELS = {"resnet": "miniature", "vit": "miniature-vit"}
"""Recipes of `ubgen-pretrain`. The ViT is trained for the main arms only."""
FIRST_SEED = 11


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    repetitions: int
    """Fine-tuning seeds, and pre-training seeds."""
    per_class: int
    """Images of each class and dataset."""
    scale: float
    """Of the benchmarks."""
    train: tuple[str, ...] = ()
    """More options of `ubgen-train`."""
    pretrain: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    weight: float = 1.0
    """Work of a run, as a share of that of size whole; for the first guess of the time left."""


SIZES = {
    "whole": Size(3, 200, 1.0),
    "small": Size(
        1,
        20,
        0.1,
        ("--max-updates", "6", "--discriminator.warmup-updates", "6"),
        ("--epochs", "2", "--warmup-epochs", "1"),
        ("--seeds", "2", "--trials", "5"),
        weight=0.1,
    ),
}
Kind = Literal["benchmarks", "real", "train", "engine", "dataset", "measure", "stats", "backbone", "eval"]
SECONDS: dict[Kind, float] = {
    "benchmarks": 65, "real": 5, "train": 650, "engine": 30, "dataset": 350, "measure": 25, "stats": 25,
    "backbone": 180, "eval": 60,
}  # fmt: skip
"""Of one run on one core, for the first guess of the time left."""


@dataclass(frozen=True)
class Run:
    """One backbone: a dataset, a network, a pre-training seed. Repetitions count from 1; `tuning` is 0 without one."""

    arm: str
    tuning: int
    model: str
    training: int

    @property
    def dataset(self) -> str:
        return f"{self.arm}-{self.tuning}" if self.tuning else self.arm

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.model}-{self.training}"

    @property
    def block(self) -> int:
        return max(self.tuning, self.training)


@dataclass(frozen=True)
class Job:
    """One command, or one call, whose last file is `made`."""

    kind: Kind
    name: str
    made: Path
    work: Sequence[str | Path] | Callable[[], object]
    needs: tuple[Path, ...] = ()
    block: int = 1

    @property
    def done(self) -> bool:
        return self.made.is_file()


def runs(size: Size) -> list[Run]:
    """Every backbone, in the order of the protocol: by the higher of its two seeds."""
    everything = [
        Run(arm, tuning, model, training)
        for arm, options in ARMS.items()
        for tuning in (range(1, size.repetitions + 1) if options else (0,))
        for model in (MODELS if arm in MAIN else ("resnet",))
        for training in range(1, size.repetitions + 1)
    ]
    return sorted(everything, key=lambda run: (run.block, run.tuning, run.training))


def jobs(size: Size, out: Path) -> list[Job]:
    """All that is to be run, in the order in which it is begun where what it needs is there."""
    plan, every = Plan(size, out), runs(size)
    found = {job.made: job for job in plan.real()}
    for block in range(1, size.repetitions + 1):
        here = [run for run in every if run.block == block]
        for steps in (plan.dataset, plan.backbone):
            for job in (job for run in here for job in steps(run)):
                found.setdefault(job.made, job)
    return list(found.values())


Command = tuple[str | Path, ...]


@dataclass(frozen=True)
class Plan:
    """The commands of one size, below one directory."""

    size: Size
    out: Path

    def real(self) -> Iterator[Job]:
        """The benchmarks, and the real images, which are some of theirs."""
        benchmarks = self.out / "benchmarks"
        write = python("ubgen.miniature.world", "--write", "benchmarks", "--scale", str(self.size.scale))
        first = Job("benchmarks", "benchmarks", benchmarks / MANIFEST, (*write, "--out", benchmarks))
        yield first
        real = partial(write_real, benchmarks / "train-biased", self.data("real"), self.size.per_class)
        yield Job("real", "real images", self.finished("real"), real, (first.made,))

    def dataset(self, run: Run) -> Iterator[Job]:
        """All that makes the dataset of a run, and its measures."""
        name, data, made = run.dataset, self.data(run.dataset), self.finished(run.dataset)
        if run.arm != "real":
            engine, lora = self.out / "engines" / name, self.out / "train" / name
            if run.tuning:
                yield self._train(run, lora)
            export: Command = (command("ubgen-export"), "--spec", "miniature", "--out", engine)
            export, needs = ((*export, "--lora", lora), (lora / MANIFEST,)) if run.tuning else (export, ())
            yield Job("engine", f"engine {name}", engine / MANIFEST, export, needs, run.block)
            synth: Command = (
                command("ubgen-synth"), "--engine", engine, "--classes", "miniature",
                "--per-class", str(self.size.per_class), "--seed", "7", "--out", data,
            )  # fmt: skip
            yield Job("dataset", f"dataset {name}", made, synth, (engine / MANIFEST,), run.block)
            stats = self.out / "stats" / name
            describe = (
                command("ubgen-dataset"),
                "stats",
                data,
                "--measures",
                "--sheets",
                "0",
                "--out",
                stats,
            )
            yield Job("stats", f"stats of {name}", stats / "stats.json", describe, (made,), run.block)
        measured = self.out / "measured" / name
        measure: Command = (
            *python("ubgen.miniature.measure", "--no-base"),
            "--dataset",
            data,
            "--out",
            measured,
        )
        yield Job("measure", f"measures of {name}", measured / "measures.json", measure, (made,), run.block)

    def _train(self, run: Run, out: Path) -> Job:
        seed = str(FIRST_SEED - 1 + run.tuning)
        train: Command = (
            command("ubgen-train"),
            *ARMS[run.arm],
            *self.size.train,
            "--seed",
            seed,
            "--out",
            out,
        )
        return Job("train", f"fine-tuning {run.dataset}", out / MANIFEST, train, (), run.block)

    def backbone(self, run: Run) -> Iterator[Job]:
        """Pre-training and evaluation."""
        backbone, evaluated = self.out / "backbones" / run.name, self.out / "eval" / run.name
        train: Command = (
            command("ubgen-pretrain"), "--data", self.data(run.dataset), "--recipe", MODELS[run.model],
            "--seed", str(run.training), "--threads", "1", *self.size.pretrain, "--out", backbone,
        )  # fmt: skip
        made, needs = backbone / MANIFEST, (self.finished(run.dataset),)
        yield Job("backbone", f"backbone {run.name}", made, train, needs, run.block)
        benchmarks = self.out / "benchmarks"
        evaluate: Command = (
            command("ubgen-eval"), "all", "--backbone", backbone, "--data", benchmarks, "--threads", "1",
            *self.size.evaluate, "--out", evaluated,
        )  # fmt: skip
        read = (made, benchmarks / MANIFEST)
        yield Job("eval", f"evaluation of {run.name}", evaluated / MANIFEST, evaluate, read, run.block)

    def data(self, dataset: str) -> Path:
        return self.out / "datasets" / dataset

    def finished(self, dataset: str) -> Path:
        """The file that is written last."""
        data = self.data(dataset)
        return data.with_suffix(".done") if dataset == "real" else data / MANIFEST


def command(name: str) -> Path:
    return Path(sys.executable).parent / name


def python(*call: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *call)


def write_real(source: Path, out: Path, per_class: int) -> None:
    """JPEGs, as synthesis writes them, of the first pictures of each class."""
    found, written = open_image_set(source), dict[int, int]()
    for i, label in enumerate(found.labels.tolist()):
        number = written.get(label, 0)
        if number < per_class:
            path = out / found.class_ids[label] / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(decode(found.read(i)), "jpg"))
            written[label] = number + 1
    out.with_suffix(".done").touch()
