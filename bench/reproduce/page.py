"""bench/results/reproduce.md and report.html, from what is finished."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import collect
from PIL import Image
from plan import ARMS, MAIN, MODELS, Run
from tables import TITLES, all_tables

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_page
from ubgen.core.files import atomic_write
from ubgen.evaluate.curves import draw_curves
from ubgen.evaluate.results import Result, all_stored
from ubgen.loading.decode import decode
from ubgen.loading.imageset import open_image_set
from ubgen.report import parts
from ubgen.report.page import write_report

_ROWS = 3  # pictures of each class


def write(runs: Sequence[Run], planned: int, size: str, out: Path, results: Path | None) -> Path:
    """report.html in `out`, and reproduce.md with its pictures in `results`; returns the report's path."""
    tables = all_tables(collect(runs, out / "eval"), runs, out)
    pictures = _pictures(runs, out)
    state = f"{len(runs)} of {planned} backbones are measured."
    if size != "whole":
        state += f" SIZE={size}: every path is taken, and the figures mean nothing."
    if results:
        _write_page(results, tables, pictures, state)
    report = out / "report.html"
    write_report(
        _directories(runs, out),
        report,
        "The paper's tables in miniature",
        [_section(tables, pictures, state)],
    )
    return report


def _pictures(runs: Sequence[Run], out: Path) -> dict[str, Path]:
    """Files by title: images of each arm, and few-shot curves of each network."""
    title = f"Images of each arm, from the top: {', '.join(_arms(runs))}"
    made = {title: out / "images.png"}
    _images(runs, out).save(made[title])
    for model in MODELS:
        few = {
            arm: _merged([run for run in runs if (run.arm, run.model) == (arm, model)], out) for arm in MAIN
        }
        if few := {arm: results for arm, results in few.items() if results}:
            title = f"Figure 4, {TITLES[model]}"
            made[title] = out / f"fewshot-{model}.png"
            draw_curves(few, made[title])
    return made


def _images(runs: Sequence[Run], out: Path) -> Image.Image:
    """Arms below each other, three rows each, a column for each class; generated ones from the same noise."""
    strips = []
    for arm in _arms(runs):
        name = next(run.dataset for run in runs if run.arm == arm)
        found = open_image_set(out / "datasets" / name)
        places = [np.flatnonzero(found.labels == k)[:_ROWS] for k in range(len(found.class_ids))]
        order = np.argsort(found.class_ids)  # folders are sorted, datasets are not
        rows = [
            np.concatenate([decode(found.read(int(places[k][row]))) for k in order], axis=1)
            for row in range(min(map(len, places)))
        ]
        strips.append(np.pad(np.concatenate(rows), ((0, 8), (0, 0), (0, 0)), constant_values=255))
    return Image.fromarray(np.concatenate(strips))


def _arms(runs: Sequence[Run]) -> list[str]:
    return [arm for arm in ARMS if any(run.arm == arm for run in runs)]


def _merged(runs: Sequence[Run], out: Path) -> list[Result]:
    """The few-shot results of several backbones as one, whose seeds are all of theirs."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for result in all_stored(out / "eval" / run.name):
            if result.evaluation == "fewshot":
                renamed = [one | {"seed": 1000 * number + one["seed"]} for one in result.details["runs"]]
                merged.setdefault(result.dataset, []).extend(renamed)
    return [Result("fewshot", dataset, {}, details={"runs": found}) for dataset, found in merged.items()]


def _write_page(results: Path, tables: Sequence[Table], pictures: dict[str, Path], state: str) -> None:
    machine = machine_record()
    head = (
        "# The paper's tables in miniature\n\nWhat is compared was decided before the first run: "
        f"[the protocol](../reproduce/PROTOCOL.md). {state}\nMade by `make reproduce`. {describe(machine)}.\n"
    )
    results.mkdir(parents=True, exist_ok=True)
    body = [table.markdown() for table in tables]
    for title, path in pictures.items():
        atomic_write(results / f"reproduce-{path.name}", path.read_bytes())
        body.append(f"![{title}](reproduce-{path.name})\n")
    write_page(results / "reproduce.md", "\n".join([head, *body]))
    content = {"machine": machine, "state": state, "tables": [vars(table) for table in tables]}
    atomic_write(results / "reproduce.json", json.dumps(content, indent=1) + "\n")


def _section(tables: Sequence[Table], pictures: dict[str, Path], state: str) -> parts.Section:
    section = parts.Section("The paper's tables in miniature", [parts.Text(state)])
    section.parts += [parts.Table(one.title, one.columns, one.rows, one.note) for one in tables]
    alt = {
        title: f"{title}; three rows for each, a column for each class"
        if "Images" in title
        else f"{title}: accuracy by share of the training images, a line for each arm"
        for title in pictures
    }
    section.parts += [parts.Picture(path, title, alt[title]) for title, path in pictures.items()]
    return section


def _directories(runs: Sequence[Run], out: Path) -> list[Path]:
    """One of each kind for each main arm, with the first seeds: the report would be too long with all of them."""
    first = {arm: next(run for run in runs if run.arm == arm) for arm in _arms(runs) if arm in MAIN}
    found = []
    for run in first.values():
        found += [out / "train" / run.dataset, out / "engines" / run.dataset, out / "datasets" / run.dataset]
        found += [out / "stats" / run.dataset, out / "backbones" / run.name, out / "eval" / run.name]
    return [path for path in found if path.exists() and path.name != "real"]
