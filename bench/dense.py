"""Detection and segmentation on the miniature's scenes: pre-trained backbones beside random ones.

    python -m ubgen.miniature.world --write benchmarks --out runs/benchmarks
    .venv/bin/python bench/dense.py --data runs/benchmarks --work runs/dense --backbones runs/backbone-1 ...

One backbone of each kind for each seed. Trainings that are finished are not done again: the same command continues.
Writes bench/results/dense.{json,md}.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_result
from ubgen.core.config import load_recipe
from ubgen.evaluate.dense.plan import share_name, train_and_measure
from ubgen.evaluate.dense.settings import DenseRecipe, DenseRun, DetectSettings, SegmentSettings
from ubgen.evaluate.results import Result, file_name, stored
from ubgen.evaluate.results import describe as describe_result

_LAYOUT = {"detect": "coco", "segment": "ade20k"}
_FIGURES = {"detect": ("box AP", "mask AP"), "segment": ("mIoU",)}
Task = Literal["detect", "segment"]


@dataclass(frozen=True)
class Arguments:
    """Detection and segmentation on the miniature's scenes."""

    data: Path
    """What `python -m ubgen.miniature.world --write benchmarks` wrote."""
    work: Path
    """Directory of the trainings."""
    backbones: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BACKBONE")]
    """Pre-trained ones, one for each seed."""
    model: str = "test_resnet"
    """timm's name of the random ones; the seed of the training is their seed."""
    detect_fraction: float = 0.5
    """Share of the training images."""
    segment_fraction: float = 1.0
    """Share of the training images."""
    threads: int = 1
    """Loader threads."""
    report_only: bool = False
    """Write the page from what is finished."""
    out: Path = Path("bench/results")
    """Directory of the figures."""


@dataclass(frozen=True)
class Planned:
    """One training."""

    kind: str
    task: Task
    run: DenseRun
    settings: DetectSettings | SegmentSettings

    @property
    def result(self) -> Result | None:
        name = file_name(self.task, share_name(_LAYOUT[self.task], self.run.fraction))
        found = stored(self.run.out, name)
        return found[0] if found else None


def planned(given: Arguments) -> list[Planned]:
    """Seed by seed. In detection the pre-trained part that is frozen would be random in a random backbone, so there is
    one more kind, of which all is trained."""
    recipe = load_recipe("miniature", DenseRecipe, "dense")
    free = replace(recipe.detect, frozen_stages=0, frozen_norm=False)
    runs = []
    for seed, trained in enumerate(given.backbones):
        at_random = f"random:{given.model}@{seed}"
        plans: tuple[tuple[Task, str, str, DetectSettings | SegmentSettings], ...] = (
            ("segment", "pre-trained", trained, recipe.segment),
            ("segment", "random", at_random, recipe.segment),
            ("detect", "pre-trained", trained, recipe.detect),
            ("detect", "random", at_random, recipe.detect),
            ("detect", "random, nothing frozen", at_random, free),
        )
        for task, kind, spec, settings in plans:
            fraction = given.detect_fraction if task == "detect" else given.segment_fraction
            out = given.work / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
            data = given.data / _LAYOUT[task]
            run = DenseRun(spec, data, out, fraction, seed=seed, device="cpu", threads=given.threads)
            runs.append(Planned(kind, task, run, settings))
    return runs


def table(task: Task, runs: Sequence[Planned], about: str) -> Table | None:
    """Median and range over the seeds, and each seed; None before the first result."""
    done = [(one.kind, result) for one in runs if one.task == task and (result := one.result)]
    if not done:
        return None
    rows: list[Sequence[str]] = []
    for kind in dict.fromkeys(kind for kind, _ in done):
        for name in _FIGURES[task]:
            values = [r.figures[name].value for k, r in done if k == kind]
            known = [value for value in values if value is not None]
            each = ", ".join("undefined" if value is None else f"{value:.1f}" for value in values)
            middle = f"{statistics.median(known):.1f} ({min(known):.1f} to {max(known):.1f})" if known else ""
            rows.append((kind, name, middle, each))
    counts = done[0][1].counts
    note = (
        f"`python bench/dense.py`: in %, on {counts['validation images']} validation images of {counts['classes']} "
        f"classes; {counts['training images']} training images, {counts['updates']} updates. A seed changes the "
        f"backbone, the share of the images, their order and the initial heads. {about}"
    )
    titles = {"detect": "Detection: Mask R-CNN", "segment": "Segmentation: UPerNet"}
    return Table(titles[task], ["backbone", "figure", "median (range)", "each seed"], rows, note=note)


def as_json(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    return [
        {
            "kind": one.kind,
            "seed": one.run.seed,
            "backbone": Path(one.run.backbone).name,
            **describe_result(result),
        }
        for one in runs
        if (result := one.result)
    ]


def main() -> None:
    given = tyro.cli(Arguments, description=__doc__)
    runs = planned(given)
    for one in runs if not given.report_only else []:
        train_and_measure(one.run, one.settings)
    machine = machine_record()
    order: tuple[Task, ...] = ("segment", "detect")
    tables = [made for task in order if (made := table(task, runs, describe(machine)))]
    write_result(given.out, "dense", {"machine": machine, "runs": as_json(runs)}, tables)
    for made in tables:
        made.show(Console())


if __name__ == "__main__":
    main()
