"""Fine-tuning and pre-training: curves, first and last values, and sample grids."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ubgen.core.metrics import METRICS_FILE, read_metrics
from ubgen.report.charts import lines
from ubgen.report.directories import Directory
from ubgen.report.overview import settings
from ubgen.report.parts import Chart, Picture, Row, Section, Table, Text, number

Lines = Sequence[Mapping[str, Any]]

_FINE_TUNING = {
    "Loss": ["loss"],
    "CLIP similarity": ["clip_similarity", "grid_clip_similarity"],
    "Q-Align score": ["quality", "grid_quality"],
    "Losses (unweighted)": ["loss_entire", "loss_individual", "loss_quality"],
    "Class-level losses (unweighted)": ["loss_class_mean", "loss_class_spread"],
    "Bias of the grids": ["grid_biased_background", "grid_class_accuracy"],
    "Variety of the grids": ["grid_background_entropy", "grid_within_class_variance"],
    "Distance from the base generator's predictions": ["base_distance"],
    "Discriminator: share that it tells right": [
        "discriminator_accuracy",
        "discriminator_held_back_accuracy",
    ],
    "Norm of the gradient": ["generator_grad_norm", "discriminator_grad_norm"],
    "Images per second": ["images_per_second"],
}
_PRE_TRAINING = {
    "Loss": ["loss"],
    "Accuracy on the validation set (%)": ["top1", "ema_top1", "top5", "ema_top5"],
    "Learning rate": ["lr"],
    "Images per second": ["images_per_second"],
}


def fine_tuning(directories: Sequence[Directory]) -> Section:
    section = Section("Fine-tuning")
    for directory in directories:
        run = _run(directory, _FINE_TUNING)
        run.parts[-1:-1] = _grids(directory)
        section.sections.append(run)
    return section


def pre_training(directories: Sequence[Directory]) -> Section:
    return Section("Pre-training", sections=[_run(directory, _PRE_TRAINING) for directory in directories])


def _run(directory: Directory, charts: Mapping[str, Sequence[str]]) -> Section:
    section = Section(directory.name)
    metrics = _metrics(directory.path / METRICS_FILE)
    if isinstance(metrics, Text):
        section.parts.append(metrics)
    elif drawn := list(_charts(metrics, charts)):
        section.parts += [Row(drawn), _table(directory.name, metrics)]
    section.parts.append(settings(directory))
    return section


def _metrics(path: Path) -> Lines | Text:
    try:
        found = read_metrics(path)
    except ValueError:
        return Text(f"{METRICS_FILE} is damaged; there are no curves.")
    if not found or not all(isinstance(line, dict) and "step" in line for line in found):
        return Text(f"{METRICS_FILE} is missing or empty; there are no curves.")
    return found


def _points(metrics: Lines, name: str) -> list[tuple[float, float]]:
    known = ((line["step"], line.get(name)) for line in metrics)
    return [(step, value) for step, value in known if isinstance(value, int | float)]


def _charts(metrics: Lines, charts: Mapping[str, Sequence[str]]) -> Iterable[Chart]:
    for title, names in charts.items():
        series = {name.replace("_", " "): points for name in names if (points := _points(metrics, name))}
        if svg := lines(title, series, "update"):
            yield Chart(title, svg)


def _table(name: str, metrics: Lines) -> Table:
    names = [
        key for key in dict.fromkeys(key for line in metrics for key in line) if key not in ("step", "phase")
    ]
    rows = []
    for key in names:
        if points := _points(metrics, key):
            values = [value for _, value in points]
            figures = (values[0], values[-1], min(values), max(values))
            rows.append([key.replace("_", " "), str(len(values)), *(number(float(v)) for v in figures)])
    columns = ["metric", "values", "first", "last", "lowest", "highest"]
    return Table(f"Metrics of {name}", columns, rows, folded=True)


def _grids(directory: Directory) -> list[Picture | Text]:
    """The first grid and the last: the same classes and the same noise before and after."""
    grids = sorted((directory.path / "samples").glob("[0-9]*.png"))
    chosen = [grids[0], grids[-1]] if len(grids) > 1 else grids
    shown = [
        Picture(
            path,
            f"Samples after {int(path.stem)} updates",
            f"Grid of sample images of {directory.name} after {int(path.stem)} updates, one column for each class",
        )
        for path in chosen
        if path.stem.isdigit()
    ]
    average = directory.path / "samples" / "average.png"
    if average.is_file():
        alt = (
            f"Grid of sample images of {directory.name} with the averaged weights, one column for each class"
        )
        shown.append(Picture(average, "Samples with the averaged weights", alt))
    if not shown:
        return [Text("There are no sample grids.")]
    return [Text("All grids show the same classes, and start from the same noise."), *shown]
