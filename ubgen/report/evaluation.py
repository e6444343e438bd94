"""Evaluation: the tables of ubgen-eval with the paper's rows in tables of their own, and few-shot curves."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from ubgen.core.errors import UserError
from ubgen.evaluate.compare import compare
from ubgen.evaluate.results import Result, all_stored
from ubgen.evaluate.tables import grids
from ubgen.report.charts import lines
from ubgen.report.directories import Directory
from ubgen.report.overview import settings
from ubgen.report.parts import Chart, Part, Row, Section, Table, Text


def evaluations(directories: Sequence[Directory]) -> Section:
    section = Section("Evaluation")
    results: dict[str, list[Result]] = {}
    for directory in directories:
        try:
            results[directory.name] = all_stored(directory.path)
        except UserError as error:
            section.parts.append(Text(str(error)))
    readable = [directory for directory in directories if directory.name in results]
    section.parts.append(_backbones(readable))
    tables = grids(results)
    if len(readable) > 1:
        try:
            tables = compare([directory.path for directory in readable])
        except UserError as error:
            section.parts.append(Text(f"Differences cannot be shown: {error}"))
    section.parts += [Table(grid.title, grid.columns, grid.rows, grid.note) for grid in tables]
    section.parts += [*_few_shot(results), *(settings(directory) for directory in readable)]
    return section


def _backbones(directories: Sequence[Directory]) -> Table:
    keys = ("name", "model", "image size", "precision", "source", "identity")
    entries = [(directory.name, directory.manifest.get("backbone") or {}) for directory in directories]
    rows = [[name, *(str(entry.get(key, "")) for key in keys)] for name, entry in entries]
    return Table("Backbones", ["directory", *keys], rows)


def _few_shot(results: Mapping[str, Sequence[Result]]) -> list[Part]:
    """For each dataset a chart with a line for each backbone: the mean of its seeds, from the lowest to the highest."""
    few = {name: [one for one in each if one.evaluation == "fewshot"] for name, each in results.items()}
    charts = []
    for dataset in dict.fromkeys(one.dataset for each in few.values() for one in each):
        seeds = {name: _by_share(one) for name, each in few.items() for one in each if one.dataset == dataset}
        means = {name: [(share, fmean(v)) for share, v in found.items()] for name, found in seeds.items()}
        bands = {
            name: [(share, min(v), max(v)) for share, v in found.items()] for name, found in seeds.items()
        }
        if svg := lines(f"Few-shot accuracy on {dataset}", means, "training images (%)", bands=bands):
            charts.append(Chart(f"{dataset}: few-shot top-1 (%)", svg))
    note = "Line: mean of the seeds. Band: lowest to highest seed."
    return [Row(charts), Text(note)] if charts else []


def _by_share(result: Result) -> dict[float, list[float]]:
    """Top-1 of each seed, by share of the training images in percent."""
    found: dict[float, list[float]] = {}
    for run in sorted(result.details.get("runs", ()), key=lambda run: float(run["fraction"])):
        found.setdefault(100 * run["fraction"], []).append(run["top-1"])
    return found
