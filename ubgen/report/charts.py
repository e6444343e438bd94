"""Small line and bar charts as SVG that takes its colours from the page, for light, dark and print."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

Points = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]
"""(x, low, high)"""

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 38
_LEGEND = 15  # height of a line of it
_POINTS = 60
_COLOURS = 4
"""Classes c0 to c3 of the style sheet."""


def lines(
    label: str,
    series: Mapping[str, Points],
    x: str,
    *,
    from_zero: bool = False,
    bands: Mapping[str, Band] | None = None,
) -> Markup | None:
    """Curves of values that are finite; None if there is no point. Each point shows its value when pointed at.

    Of more than 60 points, neighbours are averaged. `label` is for those who do not see the chart.
    `bands` lie around the curves of the same names.
    """
    curves = {name: _thinned(_finite(points)) for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    everything = [point for points in curves.values() for point in points]
    edges = [(a, end) for band in (bands or {}).values() for a, *ends in band for end in ends]
    xs, ys = (_scale([p[axis] for p in (*everything, *edges)], axis == 1 and from_zero) for axis in (0, 1))
    body = [
        _band(number, bands[name], xs, ys) for number, name in enumerate(curves) if bands and name in bands
    ]
    body += [_curve(number, name, points, xs, ys, x) for number, (name, points) in enumerate(curves.items())]
    names = list(curves) if len(curves) > 1 else []
    said = "; ".join(f"{name}: {_said(points)}" for name, points in curves.items())
    return _frame(f"{label}. {said}", xs, ys, x, Markup().join(body), names)


def bars(label: str, edges: Sequence[float], counts: Sequence[float], x: str) -> Markup | None:
    """A bar for each interval between two edges; None without one."""
    if len(edges) != len(counts) + 1 or not counts or not max(counts) > 0 or not edges[0] < edges[-1]:
        return None
    xs, ys = (edges[0], edges[-1]), _scale([0.0, *counts], True)
    drawn = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        a, b, top = _px(left, xs), _px(right, xs), _py(count, ys)
        drawn.append(
            Markup(
                '<rect class="c0" x="{}" y="{}" width="{}" height="{}"><title>{} to {}: {}</title></rect>'
            ).format(
                _n(a),
                _n(top),
                _n(max(0.5, b - a - 0.5)),
                _n(_py(0, ys) - top),
                _g(left),
                _g(right),
                _g(count),
            )
        )
    most = int(np.argmax(counts))
    said = f"From {_g(edges[0])} to {_g(edges[-1])}; most between {_g(edges[most])} and {_g(edges[most + 1])}"
    return _frame(f"{label}. {said}", xs, ys, x, Markup().join(drawn))


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in points if math.isfinite(a) and math.isfinite(b)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _POINTS:
        return points
    return [tuple(part.mean(axis=0)) for part in np.array_split(np.array(points), _POINTS)]


def _scale(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        around = abs(low) / 2 or 0.5
        return low - around, high + around
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers."""
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next((factor for factor in (1, 2, 5) if step * factor >= 0.999 * rough), 10)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _px(value: float, scale: tuple[float, float]) -> float:
    return _LEFT + (value - scale[0]) / (scale[1] - scale[0]) * (_WIDTH - _LEFT - _RIGHT)


def _py(value: float, scale: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - scale[0]) / (scale[1] - scale[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _band(number: int, band: Band, xs: tuple[float, float], ys: tuple[float, float]) -> Markup:
    around = [(a, low) for a, low, _ in band] + [(a, high) for a, _, high in reversed(band)]
    path = " ".join(f"{_n(_px(a, xs))},{_n(_py(b, ys))}" for a, b in around)
    return Markup('<polygon class="c{}" points="{}"/>').format(number % _COLOURS, path)


def _curve(
    number: int, name: str, points: Points, xs: tuple[float, float], ys: tuple[float, float], x: str
) -> Markup:
    colour = f"c{number % _COLOURS}"
    path = " ".join(f"{_n(_px(a, xs))},{_n(_py(b, ys))}" for a, b in points)
    dots = Markup().join(
        Markup('<circle class="{}" cx="{}" cy="{}" r="2.2"><title>{} {}, {}: {}</title></circle>').format(
            colour, _n(_px(a, xs)), _n(_py(b, ys)), x, _g(a), name, _g(b)
        )
        for a, b in points
    )
    dash = "5 3" if number // _COLOURS % 2 else "none"
    return (
        Markup('<polyline class="{}" stroke-dasharray="{}" points="{}"/>').format(colour, dash, path) + dots
    )


def _legend(names: Sequence[str]) -> Markup:
    """Above the plot, one line for each curve."""
    rows = [
        Markup('<circle class="c{}" cx="{}" cy="{}" r="4"/><text x="{}" y="{}">{}</text>').format(
            number % _COLOURS, _LEFT + 4, y - 4, _LEFT + 14, y, name
        )
        for number, name in enumerate(names)
        if (y := 12 - _LEGEND * (len(names) - number))
    ]
    return Markup().join(rows)


def _frame(
    label: str,
    xs: tuple[float, float],
    ys: tuple[float, float],
    x: str,
    body: Markup,
    names: Sequence[str] = (),
) -> Markup:
    right, bottom, above = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _LEGEND * len(names)
    marks = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="end" x="{}" y="{}">{}</text>'
        ).format(_LEFT, right, _n(_py(t, ys)), _n(_py(t, ys)), _LEFT - 5, _n(_py(t, ys) + 4), _g(t))
        for t in _ticks(*ys)
    ]
    marks += [
        Markup('<text class="middle" x="{}" y="{}">{}</text>').format(_n(_px(t, xs)), bottom + 14, _g(t))
        for t in _ticks(*xs)
    ]
    axis = Markup(
        '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="middle name" x="{}" y="{}">{}</text>'
    ).format(_LEFT, right, bottom, bottom, (_LEFT + right) // 2, _HEIGHT - 5, x)
    opening = Markup('<svg viewBox="0 {} {} {}" role="img" aria-label="{}">').format(
        -above, _WIDTH, _HEIGHT + above, label
    )
    return opening + Markup().join(marks) + axis + _legend(names) + body + Markup("</svg>")


def _said(points: Points) -> str:
    values = [b for _, b in points]
    return (
        f"first {_g(values[0])}, last {_g(values[-1])}, lowest {_g(min(values))}, highest {_g(max(values))}"
    )


def _n(value: float) -> str:
    return f"{value:.1f}"


def _g(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
