"""Evaluation: the tables of ubgen-eval with the paper's rows in tables of their own, and few-shot curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from ubgen.core.errors import UserError
from ubgen.evaluate.compare import compare
from ubgen.evaluate.curves import draw_curves
from ubgen.evaluate.results import Result, all_stored
from ubgen.evaluate.tables import grids
from ubgen.report.directories import Directory
from ubgen.report.overview import settings
from ubgen.report.parts import Picture, Section, Table, Text


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
    section.parts += [*_curves(results), *(settings(directory) for directory in readable)]
    return section


def _backbones(directories: Sequence[Directory]) -> Table:
    keys = ("name", "model", "image size", "precision", "source", "identity")
    entries = [(directory.name, directory.manifest.get("backbone") or {}) for directory in directories]
    rows = [[name, *(str(entry.get(key, "")) for key in keys)] for name, entry in entries]
    return Table("Backbones", ["directory", *keys], rows)


def _curves(results: Mapping[str, Sequence[Result]]) -> list[Picture]:
    few = {
        name: found
        for name, each in results.items()
        if (found := [result for result in each if result.evaluation == "fewshot"])
    }
    if not few:
        return []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fewshot.png"
        draw_curves(few, path)
        with Image.open(path) as image:
            picture = image.convert("RGB")
    alt = f"Few-shot accuracy by share of the training images, for {', '.join(few)}; the table above has the figures"
    return [Picture(picture, "Few-shot transfer", alt)]
