"""Datasets: pictures, scores, rejected images, throughput; and pairs of images before and after fine-tuning."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.stage import read_run
from ubgen.dataset import ShardDataset, open_dataset
from ubgen.dataset.card import REJECTIONS, read_classes
from ubgen.dataset.text import plain, score_titles
from ubgen.report.charts import bars, lines
from ubgen.report.directories import Directory
from ubgen.report.overview import settings
from ubgen.report.parts import Chart, Part, Picture, Row, Section, Table, Text, number

_CLASSES, _IMAGES, _SIDE = 12, 4, 96
_REJECTED = 50
_NOISE = ("class ids", "prompts", "--seed", "sampler", "--steps", "--guidance")
"""Of a dataset's identity: with all these the same, image by image starts from the same noise and asks for the same."""


def datasets(directories: Sequence[Directory]) -> Section:
    section = Section("Synthesis")
    if pairs := list(_pairs(directories)):
        section.sections.append(Section("Before and after, from the same noise", pairs))
    section.sections += [_dataset(directory) for directory in directories]
    return section


def _dataset(directory: Directory) -> Section:
    section, manifest = Section(directory.name), directory.manifest
    stats = manifest.get("stats") or {}
    section.parts += [
        _facts(directory),
        *_scores(directory.name, stats),
        *_throughput(directory.name, manifest),
    ]
    sheet = directory.path / "contact-sheet.png"
    if sheet.is_file():
        alt = f"Contact sheet of {directory.name}: a row of sample images for each class"
        section.parts.append(Picture(sheet, f"First images of the first classes of {directory.name}", alt))
    section.parts += [*_classes(directory, stats), *_rejected(directory, stats), settings(directory)]
    return section


def _facts(directory: Directory) -> Table:
    manifest = directory.manifest
    stats, speed = manifest.get("stats") or {}, manifest.get("speed") or {}
    rejected = stats.get("rejected") or {}
    facts = {
        **{name: number(value) for name, value in (manifest.get("dataset") or {}).items()},
        "base model": str(manifest.get("base_model") or "not stated"),
        "LoRA": str(manifest.get("lora_hash") or "none"),
        "images drawn again": number(sum(rejected.values())),
        "images kept with a flag": number(stats.get("flagged", 0)),
        "images per second": number(speed.get("images_per_second")),
    }
    return Table(f"Facts of {directory.name}", ["fact", "value"], [[*row] for row in facts.items()])


def _scores(where: str, stats: Mapping[str, Any]) -> Iterable[Part]:
    names = [name for name in stats.get("scores", ()) if stats[name]["count"]]
    drawn = []
    for name in names:
        shape = stats[name]["histogram"]
        edges = np.linspace(shape["low"], shape["high"], len(shape["counts"]) + 1).tolist()
        title = score_titles(name)[1]
        if svg := bars(f"Histogram of the {score_titles(name)[0]}", edges, shape["counts"], title):
            drawn.append(Chart(f"{score_titles(name)[0]}: number of images", svg))
    if drawn:
        yield Row(drawn)
    columns = ["score", "images", "mean", "standard deviation", "smallest", "median", "largest"]
    rows = [
        [
            score_titles(name)[0],
            *map(number, (stats[name][key] for key in ("count", "mean", "std", "min"))),
            number(stats[name]["quantiles"].get("0.5")),
            number(stats[name]["max"]),
        ]
        for name in names
    ]
    yield Table(f"Scores of {where}", columns, rows) if rows else Text("No image has a score.")


def _throughput(where: str, manifest: Mapping[str, Any]) -> Iterable[Part]:
    speed = manifest.get("speed") or {}
    moments = speed.get("throughput") or []
    if svg := lines("Throughput", {"images": moments}, "seconds since the start", from_zero=True):
        yield Row([Chart("Throughput: images done over time", svg)])
    shares = speed.get("bottleneck_shares") or {}
    busy = speed.get("busy_seconds") or {}
    if busy:
        rows = [[name, f"{value:.1f}", f"{100 * shares.get(name, 0):.1f} %"] for name, value in busy.items()]
        yield Table(
            f"Where the time of {where} went", ["step", "seconds busy", "share of the bottleneck"], rows
        )


def _classes(directory: Directory, stats: Mapping[str, Any]) -> Iterable[Part]:
    try:
        entries = read_classes(directory.path)
    except UserError as error:
        yield Text(str(error))
        return
    counts = stats.get("class_counts") or []
    names = [name for name in stats.get("scores", ()) if stats[name].get("class_means")]
    if len(counts) == len(entries):
        rows = [
            [
                plain(entry["name"]),
                plain(entry["id"]),
                number(counts[i]),
                *(number(stats[name]["class_means"][i]) for name in names),
            ]
            for i, entry in enumerate(entries)
        ]
        columns = ["class", "id", "images", *(f"mean {score_titles(name)[0]}" for name in names)]
        yield Table(f"Classes of {directory.name}", columns, rows, folded=len(rows) > 20)


def _rejected(directory: Directory, stats: Mapping[str, Any]) -> Iterable[Part]:
    reasons = stats.get("rejected") or {}
    if not reasons:
        yield Text("No image was rejected.")
        return
    rows = [[plain(reason), number(count)] for reason, count in reasons.items()]
    yield Table(f"Rejected images of {directory.name}", ["reason", "images"], rows)
    try:
        with (directory.path / REJECTIONS).open(encoding="utf-8") as file:
            entries = [json.loads(line) for line, _ in zip(file, range(_REJECTED), strict=False)]
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
    except (OSError, ValueError, TypeError):
        yield Text(f"{REJECTIONS} cannot be read.")
        return
    listed = [[plain(number(entry.get(key))) for key in columns] for entry in entries]
    names = [column.replace("_", " ") for column in columns]
    yield Table(f"First rejections of {directory.name}", names, listed, folded=True)


def _pairs(directories: Sequence[Directory]) -> Iterable[Part]:
    """Every dataset without a LoRA beside every one with a LoRA that asks for the same images from the same noise."""
    for one, two in combinations(directories, 2):
        base, tuned = sorted((one, two), key=lambda directory: bool(directory.manifest.get("lora_hash")))
        if base.manifest.get("lora_hash") or not tuned.manifest.get("lora_hash"):
            continue
        try:
            runs = [read_run(directory.path, "synth") for directory in (base, tuned)]
            if any(runs[0].get(key) != runs[1].get(key) for key in _NOISE):
                continue
            pictures = list(_side_by_side(base, tuned))
        except UserError as error:
            yield Text(str(error))
            continue
        yield Text(f"Upper row: {base.name}, without a LoRA. Lower row: {tuned.name}, with one.")
        yield Row(pictures)


def _side_by_side(base: Directory, tuned: Directory) -> Iterable[Picture]:
    before, after = open_dataset(base.path), open_dataset(tuned.path)
    for label, entry in enumerate(before.classes[:_CLASSES]):
        columns = [
            column for place in _places(before, after, label) if (column := _column(before, after, place))
        ]
        if columns:
            name = plain(entry["name"], 60)
            alt = f"{len(columns)} images of {name}: above of {base.name}, below of {tuned.name}"
            yield Picture(_joined(columns), name, alt)


def _places(before: ShardDataset, after: ShardDataset, label: int) -> list[int]:
    """The class's first places: image 0 of every class comes first, then image 1 of every class."""
    classes, size = len(before.classes), min(len(before), len(after))
    return [place for i in range(_IMAGES) if (place := i * classes + label) < size]


def _column(before: ShardDataset, after: ShardDataset, place: int) -> tuple[Image.Image, Image.Image] | None:
    """The two images of a place; None if they had another number of attempts, and so other noise."""
    one, two = before[place], after[place]
    if one.meta.get("identity") != two.meta.get("identity"):
        return None
    return _small(one.image), _small(two.image)


def _small(image: Image.Image) -> Image.Image:
    method = Image.Resampling.NEAREST if image.width < _SIDE else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((_SIDE, _SIDE), method)


def _joined(columns: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    sheet = Image.new("RGB", (len(columns) * (_SIDE + 4) - 4, 2 * _SIDE + 4), "white")
    for i, column in enumerate(columns):
        for row, image in enumerate(column):
            sheet.paste(image, (i * (_SIDE + 4), row * (_SIDE + 4)))
    return sheet
