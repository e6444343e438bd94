"""Tables of results: a column for each backbone, and the paper's figures in tables of their own below."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from ubgen.core.console import markdown_table
from ubgen.core.console import table as drawn
from ubgen.core.files import atomic_write
from ubgen.dataset.text import plain
from ubgen.evaluate.results import Figure, Result

AVERAGE = "average"
TITLES = {
    "val": "Accuracy on validation sets",
    "transfer": "Transfer: top-1 accuracy of a linear classifier",
    "fewshot": "Few-shot transfer: top-1 accuracy by share of the training images",
    "bias": "Bias",
    "detect": "Detection: box and mask AP of Mask R-CNN",
    "segment": "Segmentation: mIoU of UPerNet",
}
_PAPER = {
    "transfer": ("table 1", "table 4"),
    "bias": ("table 3",),
    "val": ("table 1", "table 4"),
    "detect": ("table 2 detection",),
    "segment": ("table 2 segmentation",),
}
_TRAINED = ("detect", "segment")  # networks are trained for them: the spread is that of the seeds
_PAPER_NOTE = (
    "As printed. Most of the averages printed for ResNet50 in Table 1 are means over nine columns, the ImageNet one "
    "included; measured averages here are means over the transfer datasets alone."
)


@dataclass(frozen=True)
class Grid:
    """A table of text: the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        parts = (f"## {self.title}", markdown_table(self.columns, self.rows), self.note)
        return "\n\n".join(part for part in parts if part) + "\n"

    def show(self, console: Console) -> None:
        console.print(drawn(self.title, self.columns, self.rows))
        if self.note:
            console.print(self.note, highlight=False, markup=False)


def grids(results: Mapping[str, Sequence[Result]]) -> list[Grid]:
    """The tables of some backbones' results, given by the backbones' names."""
    found = []
    for evaluation, title in TITLES.items():
        of_kind = {row: [r for r in each if r.evaluation == evaluation] for row, each in results.items()}
        if any(of_kind.values()):
            found.append(_measured(evaluation, title, of_kind))
            if evaluation == "bias":
                found.append(_counts(of_kind))
            found.extend(
                _papers(evaluation, {r.dataset for each in of_kind.values() for r in each if not _is_ours(r)})
            )
    return found


def _measured(evaluation: str, title: str, results: Mapping[str, Sequence[Result]]) -> Grid:
    cells = {name: dict(_cells(evaluation, each)) for name, each in results.items()}
    trained = evaluation in _TRAINED
    note = "In percent, means over the seeds." if trained else "In percent, with 95 % intervals."
    return by_figure(title, cells, note)


def _counts(results: Mapping[str, Sequence[Result]]) -> Grid:
    """What the figures of bias are made from: decisions by shape and by texture, sizes of partitions."""
    cells = {
        name: {
            f"{result.dataset} {what}": f"{count:,}"
            for result in each
            for what, count in result.counts.items()
        }
        for name, each in results.items()
    }
    return by_figure("Bias: counts", cells)


def by_figure(title: str, cells: Mapping[str, Mapping[str, str]], note: str = "") -> Grid:
    """A row for each figure and a column for each backbone, of which there are fewer. `cells`: backbone -> figure."""
    figures = list(dict.fromkeys(figure for each in cells.values() for figure in each))
    rows = [[plain(figure), *(each.get(figure, "") for each in cells.values())] for figure in figures]
    return Grid(title, ["", *(plain(name) for name in cells)], rows, note)


def _cells(evaluation: str, results: Sequence[Result]) -> Iterable[tuple[str, str]]:
    if evaluation in ("transfer", "val"):
        for result in results:
            yield result.dataset, result.main.text()
        if evaluation == "transfer":
            yield from _average(results)
        return
    for result in results:
        for name, figure in result.figures.items():
            yield f"{result.dataset} {name}", figure.text()


def _average(results: Sequence[Result]) -> Iterable[tuple[str, str]]:
    values = [result.main.value for result in results]
    if len(values) > 1:
        known = [value for value in values if value is not None]
        yield AVERAGE, Figure(fmean(known) if len(known) == len(values) else None).text()


def _is_ours(result: Result) -> bool:
    """Whether it was measured on the miniature's stand-in for the paper's dataset."""
    return str(result.details.get("mapping", "")).endswith("-miniature")


def _papers(evaluation: str, datasets: set[str]) -> Iterable[Grid]:
    """The paper's rows, if it has one of the datasets."""
    for name in _PAPER.get(evaluation, ()):
        printed = paper()[name]
        if evaluation == "val":
            columns = [column for column in printed["columns"] if column in datasets]
        elif evaluation in _TRAINED:
            columns = printed["columns"] if datasets & set(printed["columns"]) else []
        else:
            columns = [c for c in printed["columns"] if c in datasets or c == AVERAGE]
        digits = 2 if evaluation in _TRAINED else 1
        if set(columns) - {AVERAGE}:
            rows = [
                [
                    f"{row['backbone']}, {row['data']}",
                    *(f"{row['figures'][column]:.{digits}f}" for column in columns),
                ]
                for row in printed["rows"]
            ]
            note = _PAPER_NOTE if name == "table 1" and AVERAGE in columns else "As printed."
            title = f"The paper's figures, not measured here: {printed['title']}"
            yield Grid(title, ["backbone", *columns], rows, note)


@cache
def paper() -> dict[str, Any]:
    """The paper's Tables 1 to 4, in percent."""
    tables: dict[str, Any] = json.loads(files("ubgen").joinpath("data", "paper.json").read_text())
    return tables


def write_tables(path: Path, results: Mapping[str, Sequence[Result]]) -> None:
    """The tables of some backbones' results as a Markdown file."""
    atomic_write(path, "\n".join(grid.markdown() for grid in grids(results)))
