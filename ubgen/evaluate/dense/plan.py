"""`ubgen-eval detect` and `ubgen-eval segment`: one training for each seed, and their result."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from rich.console import Console

from ubgen.core.console import Report
from ubgen.core.errors import UserError, install_extra
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.dense.settings import DenseRun, DetectSettings, SegmentSettings, updates_per_epoch
from ubgen.evaluate.dense.tasks import Task, open_detection, open_segmentation
from ubgen.evaluate.dense.training import Stopped, train
from ubgen.evaluate.jobs import TABLES, TRAINING, Job, run_jobs
from ubgen.evaluate.results import Figure, Result, file_name
from ubgen.evaluate.tables import write_tables

_SHOWN = {"detect": ("box AP", "mask AP"), "segment": ("mIoU",)}


def train_and_measure(run: DenseRun, settings: DetectSettings | SegmentSettings) -> list[Result]:
    """Detection or segmentation, by the kind of `settings`; its result, or nothing after `stop_after`.

    Under `torchrun` or `accelerate launch` every process calls this; process 0 writes.
    """
    run.check()
    process = PartialState(cpu=run.device == "cpu" or not torch.cuda.is_available())
    seeds = range(run.seed, run.seed + run.seeds)
    tasks: Sequence[Task]
    if isinstance(settings, DetectSettings):
        _require_pycocotools()
        tasks = open_detection(run.data, settings, run.fraction, seeds)
    else:
        tasks = open_segmentation(run.data, settings, run.fraction, seeds)
    backbone = load_backbone(run.backbone, device="cpu", weights=run.weights, precision="no")
    console = Console(stderr=True, quiet=not process.is_main_process, markup=False, soft_wrap=True)
    work = partial(_train_all, run, tasks, seeds, backbone, process, console)
    try:
        if process.is_main_process:
            return _led(run, tasks[0], backbone, process, work, console)
        if _told(process):
            work(lambda done, total, note="": None)
    except Stopped:
        console.print(f"{run.out}: stopped; the same command continues")
    return []


def _require_pycocotools() -> None:
    if find_spec("pycocotools") is None:
        raise UserError(f"detection needs pycocotools: {install_extra('dense')}")


def _led(
    run: DenseRun,
    task: Task,
    backbone: Backbone,
    process: PartialState,
    work: Callable[[Report], Result],
    console: Console,
) -> list[Result]:
    """Process 0's part: it keeps the directory, and tells the others whether there is anything to train."""
    told = False

    def begin(report: Report) -> Result:
        nonlocal told
        told = True
        _tell(process, True)
        return work(report)

    identity = {**_identity(run, task), "seeds": run.seeds, "processes": process.num_processes}
    job = Job(task.evaluation, share_name(task.dataset, run.fraction), identity, begin)
    about = {
        "name": backbone.name,
        "identity": backbone.identity,
        "model": backbone.model_name,
        "precision": backbone.precision,
        "source": run.backbone,
    }
    try:
        return run_jobs(
            [job],
            run.out,
            about,
            write_tables=lambda out, results: write_tables(out / TABLES, {backbone.name: results}),
            overwrite=run.overwrite,
            console=console,
        )
    finally:
        if not told:
            _tell(process, False)


def _tell(process: PartialState, there_is_work: bool) -> None:
    broadcast(torch.tensor([int(there_is_work)], device=process.device))


def _told(process: PartialState) -> bool:
    return bool(broadcast(torch.zeros(1, dtype=torch.int64, device=process.device)).item())


def share_name(dataset: str, fraction: float) -> str:
    """As in the paper's Table 2: "coco-0.2x"."""
    return f"{dataset}-{fraction:g}x"


def _identity(run: DenseRun, task: Task) -> dict[str, Any]:
    data = {"training": task.training.digest, "validation": task.validation.digest}
    # these change no update
    free = ("checkpoint_every", "evaluate_every")
    settings = {name: value for name, value in asdict(task.settings).items() if name not in free}
    return {"settings": settings, "fraction": run.fraction, "seed": run.seed, "data": data}


def _train_all(
    run: DenseRun,
    tasks: Sequence[Task],
    seeds: range,
    backbone: Backbone,
    process: PartialState,
    console: Console,
    report: Report,
) -> Result:
    name = file_name(tasks[0].evaluation, share_name(tasks[0].dataset, run.fraction))
    if run.overwrite and process.is_main_process:
        for old in (run.out / TRAINING).glob(f"{name}-seed*"):
            shutil.rmtree(old)
    figures = []
    for number, (seed, task) in enumerate(zip(seeds, tasks, strict=True)):
        identity = {
            **_identity(run, task),
            "seed": seed,
            "backbone": backbone.identity,
            "processes": process.num_processes,
        }
        figures.append(
            train(
                task,
                backbone,
                training_directory(run.out, name, seed),
                identity,
                seed=seed,
                process=process,
                threads=run.threads,
                stop_after=run.stop_after,
                report=_shifted(report, number * task.updates, len(tasks) * task.updates),
                console=console,
            )
        )
    return _result(run, tasks, seeds, figures if process.is_main_process else [])


def training_directory(out: Path, name: str, seed: int) -> Path:
    return out / TRAINING / f"{name}-seed{seed}"


def _shifted(report: Report, before: int, total: int) -> Report:
    return lambda done, _, note="": report(before + done, total, note)


def _result(
    run: DenseRun, tasks: Sequence[Task], seeds: range, figures: Sequence[Mapping[str, float]]
) -> Result:
    task = tasks[0]
    splits = {
        f"training, seed {seed}": [each.training.names[i] for i in each.chosen]
        for seed, each in zip(seeds, tasks, strict=True)
    }
    return Result(
        task.evaluation,
        share_name(task.dataset, run.fraction),
        {
            name: Figure(_mean([each[name] for each in figures]))
            for name in _SHOWN[task.evaluation]
            if figures
        },
        counts={
            "training images": len(task.chosen),
            "of": len(task.training),
            "validation images": len(task.validation),
            "classes": len(task.training.class_names),
            "updates": task.updates,
            "updates of an epoch": updates_per_epoch(len(task.chosen), task.settings),
        },
        details={
            "seeds": {str(seed): _known(each) for seed, each in zip(seeds, figures, strict=bool(figures))},
            "settings": asdict(task.settings),
        },
        splits=splits,
    )


def _mean(values: Sequence[float]) -> float | None:
    return None if any(math.isnan(value) for value in values) else fmean(values)


def _known(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in figures.items()}
