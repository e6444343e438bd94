"""Backbones side by side: differences on the same test images, and which of them are within noise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write
from ubgen.core.stage import read_manifest
from ubgen.dataset.text import plain
from ubgen.evaluate.curves import draw_curves
from ubgen.evaluate.results import WITHOUT_PREDICTIONS, Figure, Result, all_stored, predictions
from ubgen.evaluate.tables import AVERAGE, TITLES, Grid, by_figure, grids
from ubgen.measures.intervals import resampled_means


class Units(NamedTuple):
    """What is drawn again in the bootstrap, and how its sums become the figure."""

    keys: np.ndarray
    """(N,) text: a test sample, or a foreground of which there are several images."""
    sums: np.ndarray
    """(N, S) float64: each unit's part of the sums."""
    statistic: Callable[[np.ndarray], np.ndarray]
    """(R, S) -> (R,), in percent, of sums or of means; NaN where it is undefined."""


@dataclass(frozen=True)
class Difference:
    """Of one figure of two backbones, the second less the first, in percentage points."""

    evaluation: str
    dataset: str
    figure: Figure
    replicates: np.ndarray
    """(R,) of the paired bootstrap."""
    samples: int
    """Units that both have."""

    @property
    def within_noise(self) -> bool | None:
        """Whether the 95 % interval holds 0; None if the difference is undefined."""
        if self.figure.value is None or self.figure.low is None or self.figure.high is None:
            return None
        return self.figure.low <= 0 <= self.figure.high

    def text(self) -> str:
        if self.figure.value is None or self.figure.low is None or self.figure.high is None:
            return "undefined"
        noise = ", within noise" if self.within_noise else ""
        return f"{self.figure.value:+.1f} ({self.figure.low:+.1f} to {self.figure.high:+.1f}{noise})"


def units(result: Result, columns: Mapping[str, np.ndarray]) -> dict[str, Units]:
    """A result's figures that can be compared, by name: what their bootstrap draws."""
    if result.dataset == "cue-conflict":
        return {"": _texture(columns)}
    if result.dataset == "focus":
        return {"": _context(columns)}
    if result.dataset == "in9":
        return {"": _background(columns)}
    if "fraction" in columns:
        shares = np.unique(columns["fraction"])[::-1]
        parts = (
            {name: column[columns["fraction"] == share] for name, column in columns.items()}
            for share in shares
        )
        return {f"{100 * share:g} %": _accuracy(part) for share, part in zip(shares, parts, strict=True)}
    return {"": _accuracy(columns)}


def _accuracy(columns: Mapping[str, np.ndarray]) -> Units:
    """Each sample once, with the mean over its seeds."""
    keys, sums = _grouped(columns["sample"], columns["correct"], np.ones(len(columns["correct"])))
    sums = sums / sums[:, 1:]
    return Units(keys, sums, lambda s: 100 * _ratio(s[:, 0], s[:, 1]))


def _texture(columns: Mapping[str, np.ndarray]) -> Units:
    """Texture inclination: of the decisions for shape or texture, those for texture."""
    differ = columns["label"] != columns["texture"]
    texture = differ & (columns["predicted"] == columns["texture"])
    shape = differ & (columns["predicted"] == columns["label"])
    keys, sums = _grouped(columns["sample"], texture, texture | shape)
    return Units(keys, sums, lambda s: 100 * _ratio(s[:, 0], s[:, 1]))


def _context(columns: Mapping[str, np.ndarray]) -> Units:
    """CB_avg (Eq. 9)."""
    at = [columns["uncommon"] == k for k in range(4)]
    keys, sums = _grouped(columns["sample"], *(columns["correct"] & here for here in at), *at)

    def score(s: np.ndarray) -> np.ndarray:
        accuracy = [_ratio(s[:, k], s[:, 4 + k]) for k in range(4)]
        return 100 * np.mean([_ratio(accuracy[k], accuracy[0]) for k in (1, 2, 3)], axis=0)

    return Units(keys, sums, score)


def _background(columns: Mapping[str, np.ndarray]) -> Units:
    """Accuracy on mixed_same less accuracy on mixed_rand; images of one foreground stay together."""
    same, rand = (columns["variant"] == name for name in ("mixed_same", "mixed_rand"))
    correct = columns["correct"]
    keys, sums = _grouped(columns["foreground"], correct & same, same, correct & rand, rand)
    return Units(keys, sums, lambda s: 100 * (_ratio(s[:, 0], s[:, 1]) - _ratio(s[:, 2], s[:, 3])))


def _grouped(keys: np.ndarray, *parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, their sums (N, S))."""
    distinct, where = np.unique(keys.astype(str), return_inverse=True)
    sums = np.stack([np.bincount(where, part.astype(float), len(distinct)) for part in parts], axis=1)
    return distinct, sums


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def paired(first: Units, second: Units, seed: int = 0) -> tuple[Figure, np.ndarray, int]:
    """The second's figure less the first's on the units that both have; replicates (R,); number of units.

    Percentile bootstrap, in which both get the same units. UserError if they share none.
    """
    keys, a, b = np.intersect1d(first.keys, second.keys, assume_unique=True, return_indices=True)
    if not len(keys):
        raise UserError("they were evaluated on other test images")
    sides = ((first, first.sums[a]), (second, second.sums[b]))
    means = resampled_means(np.concatenate([sums for _, sums in sides], axis=1), seed=seed)
    before, after = (float(one.statistic(sums.sum(0, keepdims=True))[0]) for one, sums in sides)
    width = first.sums.shape[1]
    replicates = second.statistic(means[:, width:]) - first.statistic(means[:, :width])
    return _figure(after - before, replicates), replicates, len(keys)


def _figure(value: float, replicates: np.ndarray) -> Figure:
    """A replicate in which the figure is undefined, such as one without an image of a partition, does not count."""
    if np.isnan(value) or np.isnan(replicates).all():
        return Figure(None, unit="points")
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return Figure(value, float(low), float(high), "points")


def differences(first: Path, second: Path) -> list[Difference]:
    """Of all figures that both output directories have; the mean over transfer datasets last."""
    found = list(_differences(first, second))
    transfer = [one for one in found if one.evaluation == "transfer"]
    if len(transfer) > 1:
        values = [one.figure.value for one in transfer]
        value = np.nan if None in values else float(np.mean([v for v in values if v is not None]))
        replicates = np.mean([one.replicates for one in transfer], axis=0)
        samples = sum(one.samples for one in transfer)
        found.append(Difference("transfer", AVERAGE, _figure(value, replicates), replicates, samples))
    return found


def _differences(first: Path, second: Path) -> Iterator[Difference]:
    there = {result.name: result for result in all_stored(second)}
    for number, result in enumerate(all_stored(first)):
        if result.name not in there or result.evaluation in WITHOUT_PREDICTIONS:
            continue
        ours, theirs = (units(result, predictions(out, result.name)) for out in (first, second))
        for part in ours:
            if part in theirs:
                try:
                    figure, replicates, count = paired(ours[part], theirs[part], seed=number)
                except UserError as error:
                    raise UserError(f"{first} and {second}: {result.name}: {error}") from None
                name = f"{result.dataset} {part}".strip()
                yield Difference(result.evaluation, name, figure, replicates, count)


def compare(outs: Sequence[Path]) -> list[Grid]:
    """The tables of some output directories side by side, and their differences to the first one."""
    outs = [out for out in outs if out.is_dir()]  # of a glob
    if len(outs) < 2:
        raise UserError("ubgen-eval compare needs two or more output directories of ubgen-eval")
    for out in outs:
        read_manifest(out, "eval")
    names = _names(outs)
    shown = grids({name: all_stored(out) for name, out in zip(names, outs, strict=True)})
    compared = {name: differences(outs[0], out) for name, out in zip(names[1:], outs[1:], strict=True)}
    for evaluation, title in TITLES.items():
        cells = {
            name: {one.dataset: one.text() for one in each if one.evaluation == evaluation}
            for name, each in compared.items()
        }
        if any(cells.values()):
            shown.append(by_figure(f"{title}: differences to {plain(names[0])}", cells, _NOTE))
    return shown


_NOTE = (
    "In percentage points, with the 95 % interval of a paired bootstrap over the test images that both have. "
    '"Within noise": the interval holds 0. The intervals do not cover the chance of training; for that, train with '
    "several seeds. Of twenty differences that are none, one is expected outside its interval."
)


def _names(outs: Sequence[Path]) -> list[str]:
    """The directories' names; whole paths where two are the same."""
    names = [out.resolve().name for out in outs]
    return names if len(set(names)) == len(names) else [str(out) for out in outs]


def write_comparison(out: Path, outs: Sequence[Path], grids: Sequence[Grid]) -> list[Path]:
    """compare.md, and fewshot.png where there are few-shot results, into the directory `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "compare.md"]
    atomic_write(written[0], "\n".join(grid.markdown() for grid in grids))
    outs = [path for path in outs if path.is_dir()]
    few = {
        name: found
        for name, path in zip(_names(outs), outs, strict=True)
        if (found := [result for result in all_stored(path) if result.evaluation == "fewshot"])
    }
    if few:
        written.append(out / "fewshot.png")
        draw_curves(few, written[1])
    return written
