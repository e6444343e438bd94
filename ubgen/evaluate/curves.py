"""Few-shot curves as a picture, in the manner of the paper's Figure 4."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.evaluate.catalogue import DATASETS
from ubgen.evaluate.results import Result

_COLUMNS = 3
MEAN = "mean of the datasets"


def draw_curves(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """PNG: a panel for each dataset, and one for their mean; a line for each backbone, a band from seed to seed.

    `results` are the few-shot results of each backbone. The line is the mean over the seeds, the band reaches from the
    lowest to the highest seed. The mean has a line for each backbone that has all datasets.
    """
    from matplotlib.figure import Figure as Picture  # not pyplot: it would look for a display

    series = {name: _series(found) for name, found in results.items()}
    panels = list(dict.fromkeys(dataset for of_backbone in series.values() for dataset in of_backbone))
    if not panels:
        raise UserError("there is no few-shot result to draw")
    if len(panels) > 1:
        panels = _with_mean(series, panels)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    picture = Picture(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).ravel()
    for panel, axis in zip(panels, axes[: len(panels)], strict=True):
        _draw_panel(axis, panel, series)
    for axis in axes[::columns]:
        axis.set_ylabel("top-1 (%)")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, names = picture.axes[0].get_legend_handles_labels()
    picture.legend(
        handles,
        names,
        title="line: mean of the seeds; band: lowest to highest seed",
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    buffer = BytesIO()
    picture.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


Curve = dict[float, np.ndarray]
"""Top-1 in percent of each seed, by fraction."""


def _series(results: Sequence[Result]) -> dict[str, Curve]:
    return {result.dataset: _curve(result) for result in results if result.evaluation == "fewshot"}


def _curve(result: Result) -> Curve:
    found: dict[float, list[float]] = {}
    for run in sorted(result.details["runs"], key=lambda run: (run["fraction"], run["seed"])):
        found.setdefault(run["fraction"], []).append(run["top-1"])
    return {fraction: np.array(values) for fraction, values in found.items()}


def _with_mean(series: dict[str, dict[str, Curve]], panels: list[str]) -> list[str]:
    for of_backbone in series.values():
        curves = [of_backbone[dataset] for dataset in panels if dataset in of_backbone]
        shapes = {tuple((fraction, len(values)) for fraction, values in curve.items()) for curve in curves}
        if len(curves) == len(panels) and len(shapes) == 1:
            of_backbone[MEAN] = {
                fraction: np.mean([curve[fraction] for curve in curves], axis=0) for fraction in curves[0]
            }
    return [*panels, MEAN] if any(MEAN in of_backbone for of_backbone in series.values()) else panels


def _draw_panel(axis: Any, panel: str, series: Mapping[str, Mapping[str, Curve]]) -> None:
    ticks: set[float] = set()
    for number, (backbone, of_backbone) in enumerate(series.items()):
        curve = of_backbone.get(panel, {})
        shares = [100 * fraction for fraction in curve]
        colour = f"C{number % 10}"
        axis.plot(shares, [values.mean() for values in curve.values()], "o-", color=colour, label=backbone)
        low, high = ([end(values) for values in curve.values()] for end in (np.min, np.max))
        axis.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
        ticks.update(shares)
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)], minor=False)
    axis.minorticks_off()
    axis.set_title(DATASETS[panel].title if panel in DATASETS else panel)
    axis.set_xlabel("training images (%)")
    axis.grid(alpha=0.3)
