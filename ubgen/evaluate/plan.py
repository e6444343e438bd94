"""What an `ubgen-eval` command consists of: all inputs are looked at first, then each evaluation is a job."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ubgen.core.console import Report
from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.bias import BENCHMARKS, open_benchmarks, require_benchmarks
from ubgen.evaluate.catalogue import DATASETS
from ubgen.evaluate.curves import draw_curves
from ubgen.evaluate.datasets import TransferData, open_datasets, require_datasets
from ubgen.evaluate.fewshot import fewshot
from ubgen.evaluate.jobs import FEATURES, TABLES, Job, run_jobs
from ubgen.evaluate.results import Result
from ubgen.evaluate.settings import EvalSettings, FewShotSettings, Probing, TransferSettings
from ubgen.evaluate.tables import write_tables
from ubgen.evaluate.transfer import transfer
from ubgen.evaluate.validation import open_validation, validation

SUITE = "benchmarks.json"
"""In the root of the datasets: {"transfer": [names], "bias": [names], "val": [names]}, the defaults of --datasets."""
CURVES = "fewshot.png"
_PAPERS = {
    "transfer": ("aircraft", "cars", "dtd", "eurosat", "flowers", "pets", "food101", "sun397"),
    "bias": tuple(BENCHMARKS),
    "val": ("imagenet",),
}


class Wanted(NamedTuple):
    """Which datasets each evaluation is to use; empty: it is not asked for."""

    transfer: tuple[str, ...] = ()
    fewshot: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    val: tuple[str, ...] = ()


def evaluate(
    evaluations: Sequence[str],
    settings: EvalSettings,
    *,
    probing: Probing | None = None,
    transfer_settings: TransferSettings | None = None,
    fewshot_settings: FewShotSettings | None = None,
) -> list[Result]:
    """Do `evaluations` ("transfer", "fewshot", "bias", "val") of one backbone; returns their results.

    Every dataset is looked for before anything is computed: one UserError names all that is missing. Results are kept
    in `settings.out` as they come; the same call continues.
    """
    wanted, probing = which(evaluations, settings), probing or Probing()
    _require(wanted, settings.data, probing)
    backbone = _backbone(settings, settings.weights)
    jobs = list(
        _jobs(
            wanted,
            backbone,
            settings,
            probing,
            transfer_settings or TransferSettings(),
            fewshot_settings or FewShotSettings(),
        )
    )
    about = {
        "name": backbone.name,
        "identity": backbone.identity,
        "model": backbone.model_name,
        "image size": backbone.image_size,
        "precision": backbone.precision,
        "source": settings.backbone,
    }
    console = Console(stderr=True, markup=False, soft_wrap=True)
    return run_jobs(
        jobs,
        settings.out,
        about,
        write_tables=_tables(backbone.name),
        overwrite=settings.overwrite,
        console=console,
    )


def which(evaluations: Sequence[str], settings: EvalSettings) -> Wanted:
    """The datasets of each evaluation: those that the user names, those of the root's suite, or the paper's."""
    named = tuple(name.strip() for name in settings.datasets.split(",") if name.strip())
    if len(set(named)) < len(named):
        raise UserError(f"--datasets names one twice: {settings.datasets}")
    if named and len(evaluations) > 1:
        raise UserError("--datasets belongs to one evaluation; leave it out with all")
    suite = {**_PAPERS, **_suite(settings.data)}
    return Wanted(
        **{each: named or tuple(suite["transfer" if each == "fewshot" else each]) for each in evaluations}
    )


def _suite(root: Path) -> dict[str, tuple[str, ...]]:
    path = root / SUITE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: tuple(map(str, content[name])) for name in _PAPERS if name in content}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f'{path} must be a JSON object such as {{"transfer": ["dtd"], "bias": ["in9"]}}'
        ) from None


def _require(wanted: Wanted, root: Path, probing: Probing) -> None:
    """UserError naming everything that is missing. Takes no time, and needs no backbone."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such directory")
    for name in (*wanted.transfer, *wanted.fewshot):
        if name not in DATASETS and probing.splits == "paper":
            raise UserError(f"--splits paper: the paper has no dataset {name!r}")
    transfer_names = tuple(dict.fromkeys((*wanted.transfer, *wanted.fewshot)))
    _all_or_error(
        (
            *(
                [lambda: require_datasets(transfer_names, root, download=probing.download)]
                if transfer_names
                else []
            ),
            *([lambda: require_benchmarks(wanted.bias, root)] if wanted.bias else []),
            *(lambda name=name: open_validation(name, root) for name in wanted.val),
        )
    )


def _all_or_error(checks: Iterable[Callable[[], Any]]) -> None:
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _backbone(settings: EvalSettings, weights: Any) -> Backbone:
    return load_backbone(
        settings.backbone,
        device=settings.device,
        weights=weights,
        classes=settings.classes,
        image_size=settings.image_size,
        precision=settings.precision,
    )


def _jobs(
    wanted: Wanted,
    backbone: Backbone,
    settings: EvalSettings,
    probing: Probing,
    transfer_settings: TransferSettings,
    fewshot_settings: FewShotSettings,
) -> Iterable[Job]:
    how: Any = {
        "cache": settings.features or settings.out / FEATURES,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "loader": settings.loader,
    }
    names = tuple(dict.fromkeys((*wanted.transfer, *wanted.fewshot)))
    opened = (
        open_datasets(names, settings.data, splits=probing.splits, download=probing.download) if names else {}
    )
    benchmarks = open_benchmarks(wanted.bias, settings.data, backbone) if wanted.bias else {}
    for name in wanted.val:
        yield _validation_job(name, backbone, settings, how)
    for name in wanted.transfer:
        work = partial(transfer, backbone, opened[name], transfer_settings, **how)
        yield Job("transfer", name, _identity(transfer_settings, probing, opened[name]), _reporting(work))
    for name in wanted.fewshot:
        few = partial(fewshot, backbone, opened[name], fewshot_settings, **how)
        yield Job("fewshot", name, _identity(fewshot_settings, probing, opened[name]), _reporting(few))
    for name, data in benchmarks.items():
        judge = partial(BENCHMARKS[name].evaluate, backbone, data, **how)
        yield Job("bias", name, {"data": data.fingerprint()}, _reporting(judge))


def _identity(settings: TransferSettings, probing: Probing, data: TransferData) -> dict[str, Any]:
    return {**asdict(settings), "splits": probing.splits, "data": data.fingerprint()}


def _reporting(work: Callable[..., Result]) -> Callable[[Report], Result]:
    return lambda report: work(report=report)


def _validation_job(name: str, backbone: Backbone, settings: EvalSettings, how: Any) -> Job:
    """Of a run with a moving average, both weights."""
    data = open_validation(name, settings.data)
    raw = _backbone(settings, "raw") if settings.weights == "ema" else None
    if raw is not None and raw.identity == backbone.identity:
        raw = None
    work = partial(validation, backbone, data, name, raw=raw, **how)
    return Job("val", name, {"data": data.fingerprint()}, _reporting(work))


def _tables(name: str) -> Callable[[Path, Sequence[Result]], None]:
    """Writes a directory's tables, and its few-shot curves."""

    def write(out: Path, results: Sequence[Result]) -> None:
        write_tables(out / TABLES, {name: results})
        if few := [result for result in results if result.evaluation == "fewshot"]:
            draw_curves({name: few}, out / CURVES)

    return write
