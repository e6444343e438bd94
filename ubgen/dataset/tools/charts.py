"""Charts as PNG, drawn without matplotlib's global state, so that they may be drawn anywhere."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ubgen.dataset.text import score_titles

_FILL, _LINE, _MARK, _FAINT = "#4c78a8", "#2f4b6e", "#e45756", "#888888"
_POINTS = 240
_UNITS = (
    (2 * 86400, 86400.0, "days"),
    (2 * 3600, 3600.0, "hours"),
    (120, 60.0, "minutes"),
    (0, 1.0, "seconds"),
)


def score_figure(stats: Mapping[str, Any]) -> bytes | None:
    """For every score of `dataset_stats`: its histogram, and the classes' means in order. None without scores."""
    names = [name for name in stats["scores"] if stats[name]["count"]]
    if not names:
        return None
    figure = _figure(6.0 * len(names), 7.5)
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        _draw_histogram(axes[0, column], name, stats[name])
        _draw_class_means(axes[1, column], name, stats[name])
    figure.suptitle(f"Scores of {stats['images']:,} images")
    return _png(figure)


def throughput_figure(throughput: Sequence[tuple[float, int]]) -> bytes | None:
    """Images per second over time, and the images done. None when there are fewer than two moments.

    `throughput` holds (seconds since the start, images done by then).
    """
    moments = _rising(throughput)
    if len(moments) < 2:
        return None
    seconds, done = moments[:, 0], moments[:, 1]
    scale, unit = next((scale, unit) for least, scale, unit in _UNITS if seconds[-1] >= least)
    rates = np.diff(done) / np.diff(seconds)
    mean = (done[-1] - done[0]) / (seconds[-1] - seconds[0])
    figure = _figure(10.0, 4.5)
    axes = figure.subplots()
    axes.stairs(rates, seconds / scale, color=_LINE, fill=True, facecolor=_FILL, alpha=0.6, label="images/s")
    axes.axhline(mean, color=_MARK, linewidth=1, label=f"mean {mean:,.3g} images/s")
    axes.set(xlabel=f"time since the start ({unit})", ylabel="images per second", title="Throughput")
    axes.set_ylim(0, None)
    axes.set_xlim(seconds[0] / scale, seconds[-1] / scale)
    total = axes.twinx()
    total.plot(seconds / scale, done, color=_FAINT, linewidth=1, linestyle="--", label="images done")
    total.set_ylabel("images done")
    total.set_ylim(0, None)
    lines = [axes.get_legend_handles_labels(), total.get_legend_handles_labels()]
    axes.legend(lines[0][0] + lines[1][0], lines[0][1] + lines[1][1], loc="lower right", fontsize="small")
    return _png(figure)


def _rising(throughput: Sequence[tuple[float, int]]) -> np.ndarray:
    """(M,2): at most some hundred moments, in order, none twice."""
    moments = np.array([(float(s), float(n)) for s, n in throughput]).reshape(-1, 2)
    moments = moments[np.argsort(moments[:, 0], kind="stable")]
    later = np.concatenate([np.diff(moments[:, 0]) > 0, [True]]) if len(moments) else np.array([], bool)
    moments = moments[later]  # of several at one moment, the last
    if len(moments) <= _POINTS:
        return moments
    return moments[np.unique(np.linspace(0, len(moments) - 1, _POINTS).round().astype(int))]


def _draw_histogram(axes: Any, name: str, stats: Mapping[str, Any]) -> None:
    histogram, quantiles = stats["histogram"], stats["quantiles"]
    edges = np.linspace(histogram["low"], histogram["high"], len(histogram["counts"]) + 1)
    axes.stairs(histogram["counts"], edges, color=_LINE, fill=True, facecolor=_FILL, alpha=0.8)
    axes.axvline(quantiles["0.5"], color=_MARK, linewidth=1.5, label=f"median {quantiles['0.5']:.4g}")
    for quantile, label in (("0.05", "5 % and 95 %"), ("0.95", None)):
        axes.axvline(quantiles[quantile], color=_MARK, linewidth=1, linestyle=":", label=label)
    axes.set(xlabel=_label(name), ylabel="images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def _draw_class_means(axes: Any, name: str, stats: Mapping[str, Any]) -> None:
    means = sorted(mean for mean in stats["class_means"] if mean is not None)
    axes.plot(range(1, len(means) + 1), means, color=_LINE, linewidth=1, marker=".", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(stats["mean"], color=_MARK, linewidth=1, label=f"mean of all images {stats['mean']:.4g}")
    axes.set(xlabel="classes, from the lowest mean to the highest", ylabel=f"mean {_label(name, 0)}")
    axes.legend(fontsize="small")


def _label(name: str, length: int = 1) -> str:
    """matplotlib takes what stands between dollar signs for mathematics."""
    return score_titles(name)[length].replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
