"""An evaluation's output directory: each result is stored as soon as it is there, and never computed twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ubgen.core.console import Report, progress
from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.core.stage import Stage, first_difference
from ubgen.evaluate.results import (
    FIGURES,
    PREDICTIONS,
    SPLITS,
    Result,
    all_stored,
    describe,
    file_name,
    save,
    stored,
)

RESULTS, TABLES, FEATURES = "results.json", "results.md", "features"
TRAINING = "training"  # of detection and segmentation: a directory for each seed
_OWN = (FIGURES, PREDICTIONS, SPLITS, FEATURES, TRAINING, RESULTS, TABLES, "*.png")


@dataclass(frozen=True)
class Job:
    """One evaluation on one dataset that is to be done."""

    evaluation: str
    dataset: str
    identity: Mapping[str, Any]
    """What the result depends on besides the backbone: settings, and the data's fingerprint."""
    work: Callable[[Report], Result]

    @property
    def name(self) -> str:
        return file_name(self.evaluation, self.dataset)


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    backbone: Mapping[str, Any],
    *,
    write_tables: Callable[[Path, Sequence[Result]], None],
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Result]:
    """Do what is not done yet, one job after another; returns the results of all `jobs`.

    `out` belongs to one `backbone`, whose "identity" and "precision" tell it from others, and takes
    in the results of any number of commands. A job that is there with other settings is a UserError, unless `overwrite`
    does it again. `write_tables` gets all results of the directory at the end.
    """
    console = console or Console(stderr=True, markup=False, soft_wrap=True)
    stage = _stage(out, backbone, overwrite)
    with stage.hold():
        todo = [job for job in jobs if overwrite or not _is_done(out, job)]
        if stage.state == "finished" and not todo:
            console.print(f"{out}: finished already; nothing to do")
            return _results(out, jobs)
        stage.begin()
        for number, job in enumerate(todo, 1):
            title = f"{job.evaluation} on {job.dataset} ({number} of {len(todo)})"
            console.print(title)
            with progress(console, title, "steps") as report:
                result = job.work(report)
            save(out, result, _as_json(job.identity))
            console.print(f"{title}: {next(iter(result.figures))} {result.main.text()} {result.main.unit}")
        everything = all_stored(out)
        summary = {"backbone": backbone, "results": [describe(result) for result in everything]}
        atomic_write(out / RESULTS, json.dumps(summary, indent=1) + "\n")
        write_tables(out, everything)
        stage.finish({}, backbone=backbone)
    return _results(out, jobs)


def _stage(out: Path, backbone: Mapping[str, Any], overwrite: bool) -> Stage:
    """With `overwrite`, another backbone's directory is cleared; this one's only gets its jobs done again."""

    def of(overwrite: bool) -> Stage:
        identity = {"backbone": backbone["identity"], "precision": backbone["precision"]}
        return Stage(
            out,
            "eval",
            identity,
            config=backbone,
            owns=_OWN,
            has_work=lambda store: any(name in (FIGURES, TRAINING) for name in store.entries()),
            overwrite=overwrite,
        )

    stage = of(False)
    if overwrite:
        try:
            stage.look()
        except UserError:
            return of(True)
    return stage


def _is_done(out: Path, job: Job) -> bool:
    there = stored(out, job.name)
    if there is None:
        return False
    if difference := first_difference(there[1], _as_json(job.identity)):
        raise UserError(
            f"{out} holds {job.evaluation} on {job.dataset} with other settings ({difference}); use the same, choose "
            "another --out, or pass --overwrite to do it again"
        )
    return True


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return values


def _results(out: Path, jobs: Sequence[Job]) -> list[Result]:
    found = (stored(out, job.name) for job in jobs)
    return [result[0] for result in found if result]
