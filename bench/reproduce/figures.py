"""From the predictions of many backbones to figures of each arm, with intervals over images and over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plan import Run
from scipy import stats

from ubgen.core.errors import UserError
from ubgen.evaluate.compare import units
from ubgen.evaluate.results import all_stored, predictions
from ubgen.measures.intervals import resampled_means

MEAN, FEW_SHOT = "transfer: mean", "few-shot: mean at"
RISE = "few-shot: mean at 10 % less at 100 %"


@dataclass(frozen=True)
class Values:
    """One figure of some runs, in percent or points."""

    value: np.ndarray
    """(N,) of each run."""
    draws: np.ndarray
    """(R, N) of each run in each resample of the test images, which are the same for all runs."""


@dataclass(frozen=True)
class Estimate:
    """The mean over runs, and 95 % intervals: over test images, and over seeds where there are several."""

    value: float
    images: tuple[float, float]
    seeds: tuple[float, float] | None
    runs: int

    def text(self, sign: bool = False) -> str:
        """ "71.3 (70.1 to 72.4; seeds 68.0 to 74.6)"."""
        form = "{:+.1f}" if sign else "{:.1f}"
        ends = "{} to {}".format(*map(form.format, self.images))
        if self.seeds:
            ends += "; seeds {} to {}".format(*map(form.format, self.seeds))
        return f"{form.format(self.value)} ({ends})"

    def verdict(self, sign: int) -> str:
        """Whether the difference has this sign (PROTOCOL.md, "What would hold")."""
        if not self.seeds:
            return "cannot be told"
        for direction, word in ((sign, "holds"), (-sign, "contradicted")):
            if all(direction * end > 0 for ends in (self.images, self.seeds) for end in ends):
                return word
        return "cannot be told"


def collect(runs: Sequence[Run], evaluated: Path) -> dict[str, Values]:
    """All figures that every run has, by name such as "transfer: novel-class" or "bias: focus".

    UserError where runs were measured on other images.
    """
    outs = [evaluated / run.name for run in runs]
    found: dict[str, Values] = {}
    for number, result in enumerate(all_stored(outs[0])):
        each = [units(result, predictions(out, result.name)) for out in outs]
        for part, first in each[0].items():
            sides = [one[part] for one in each]
            if any(not np.array_equal(side.keys, first.keys) for side in sides):
                raise UserError(f"{result.name}: the runs below {evaluated} were measured on other images")
            means = resampled_means(np.concatenate([side.sums for side in sides], axis=1), seed=number)
            pieces = np.split(means, len(sides), axis=1)
            name = f"{result.evaluation}: {result.dataset} {part}".strip()
            found[name] = Values(
                np.array([side.statistic(side.sums.sum(0, keepdims=True))[0] for side in sides]),
                np.stack([side.statistic(piece) for side, piece in zip(sides, pieces, strict=True)], axis=1),
            )
    return found | _means(found)


def _means(found: dict[str, Values]) -> dict[str, Values]:
    """Means over the transfer tasks, at each share of the training images too."""
    made = {}
    groups = {MEAN: [values for name, values in found.items() if name.startswith("transfer: ")]}
    for name, values in found.items():
        if name.startswith("fewshot: "):
            share = " ".join(name.split()[-2:])
            groups.setdefault(f"{FEW_SHOT} {share}", []).append(values)
    for name, members in groups.items():
        if members:
            made[name] = _combined(lambda *x: np.mean(x, axis=0), *members)
    few, all_images = (made.get(f"{FEW_SHOT} {share} %") for share in (10, 100))
    if few and all_images:
        made[RISE] = _combined(lambda a, b: a - b, few, all_images)
    return made


def _combined(function: Callable[..., np.ndarray], *values: Values) -> Values:
    return Values(function(*(one.value for one in values)), function(*(one.draws for one in values)))


def estimate(values: Values, runs: Sequence[Run]) -> Estimate:
    """Of one arm."""
    with np.errstate(invalid="ignore"):
        low, high = np.nanpercentile(values.draws.mean(axis=1), [2.5, 97.5])
    return Estimate(
        float(values.value.mean()), (float(low), float(high)), over_seeds(values.value, runs), len(runs)
    )


def over_seeds(value: np.ndarray, runs: Sequence[Run]) -> tuple[float, float] | None:
    """Student's t on the means of each fine-tuning seed, and of each pre-training seed: the wider interval."""
    widths = []
    for seeds in ([run.tuning for run in runs], [run.training for run in runs]):
        means = [value[np.equal(seeds, seed)].mean() for seed in sorted(set(seeds))]
        if len(means) > 1:
            error = np.std(means, ddof=1) / np.sqrt(len(means))
            widths.append(float(stats.t.ppf(0.975, len(means) - 1) * error))
    if not widths:
        return None
    middle = float(value.mean())
    return middle - max(widths), middle + max(widths)


def arm_estimates(values: Values, runs: Sequence[Run], model: str) -> dict[str, Estimate]:
    """Of each arm that has backbones of this model."""
    places = by_arm(runs, model)
    return {arm: estimate(_taken(values, at), [runs[i] for i in at]) for arm, at in places.items()}


def difference(values: Values, runs: Sequence[Run], model: str, arm: str, against: str) -> Estimate | None:
    """Run by run with the same pre-training seed, and the same fine-tuning seed where both arms have some."""
    places = by_arm(runs, model)
    if arm not in places or against not in places:
        return None
    partner = {(runs[i].tuning, runs[i].training): i for i in places[against]}
    pairs = []
    for i in places[arm]:
        for tuning in (runs[i].tuning, 0):
            if (tuning, runs[i].training) in partner:
                pairs.append((i, partner[tuning, runs[i].training]))
                break
    ours, theirs = (_taken(values, side) for side in zip(*pairs, strict=True))
    return estimate(_combined(lambda a, b: a - b, ours, theirs), [runs[i] for i, _ in pairs])


def by_arm(runs: Sequence[Run], model: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if run.model == model:
            found.setdefault(run.arm, []).append(i)
    return found


def _taken(values: Values, places: Sequence[int]) -> Values:
    return Values(values.value[list(places)], values.draws[:, list(places)])
