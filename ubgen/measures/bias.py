"""The paper's three measures of bias (section 4.3, Table 3), from predictions: texture, context, background.

Inputs are arrays or lists of equal length, one entry an image. Results are in percent or percentage points; what has no
value, such as the accuracy of no image, is None and never 0. Intervals hold 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubgen.core.errors import UserError

Interval = tuple[float, float]
_Z = 1.959964  # of 95 %
_RESAMPLES = 10_000
_LEAST_DEFINED = 0.975
_PARTITIONS = 4


@dataclass(frozen=True)
class ShapeBias:
    """Decisions on images whose shape is of one class and whose texture is of another."""

    texture_inclination: float | None
    """Percent: texture_correct / counted; 100 minus the shape bias. None if nothing counts."""
    shape_correct: int
    """Images predicted as the class of their shape."""
    texture_correct: int
    """Images predicted as the class of their texture."""
    counted: int
    """shape_correct + texture_correct."""
    images: int
    """Images whose shape and texture differ."""
    standard_error: float | None
    """Percentage points, binomial: of a share among `counted` decisions."""
    interval: Interval | None
    """Wilson's, which is not empty at 0 % or 100 %."""


@dataclass(frozen=True)
class ContextScore:
    """Accuracy by number k of uncommon attributes, and what is left of it in uncommon contexts (Eq. 9)."""

    cb_avg: float | None
    """Percent: mean over k = 1, 2, 3 of accuracy[k] / accuracy[0]. None if a partition is empty or accuracy[0] is 0."""
    cb_12: float | None
    """The same over k = 1, 2; FOCUS has only 21 images with k = 3."""
    accuracy: tuple[float | None, ...]
    """Percent, for k = 0..3; None for a partition without an image."""
    count: tuple[int, ...]
    """Images, for k = 0..3."""
    correct: tuple[int, ...]
    cb_avg_standard_error: float | None
    cb_avg_interval: Interval | None
    cb_12_standard_error: float | None
    cb_12_interval: Interval | None


@dataclass(frozen=True)
class BackgroundGap:
    """What accuracy loses when the background comes from another class."""

    gap: float | None
    """Percentage points: accuracy(mixed_same) - accuracy(mixed_rand). None without an image."""
    standard_error: float | None
    """Percentage points, of the mean of the pairs' differences. None with fewer than two."""
    interval: Interval | None
    """Bootstrap over the foregrounds."""
    same_accuracy: float | None
    rand_accuracy: float | None
    count: int
    """Images of mixed_same."""


def shape_bias(predicted: Any, shapes: Any, textures: Any) -> ShapeBias:
    """Texture inclination TI on cue conflict (section 4.3, "Shape-Texture Bias").

    `predicted`, `shapes`, `textures`: N category names (or numbers). Images whose shape and texture are the same do not
    count. A prediction that is neither counts for neither. UserError for unequal lengths, or names beside numbers.
    """
    answer, shape, texture = _names(predicted=predicted, shapes=shapes, textures=textures)
    conflict = shape != texture
    by_shape = int((conflict & (answer == shape)).sum())
    by_texture = int((conflict & (answer == texture)).sum())
    counted = by_shape + by_texture
    return ShapeBias(
        100 * by_texture / counted if counted else None,
        by_shape,
        by_texture,
        counted,
        int(conflict.sum()),
        100 * float(np.sqrt(by_texture * by_shape / counted**3)) if counted else None,
        wilson(by_texture, counted),
    )


def context_score(correct_N: Any, uncommon_N: Any, *, seed: int = 0) -> ContextScore:
    """CB_avg on FOCUS (Eq. 9), and the same over k = 1, 2.

    `correct_N`: bool or 0/1. `uncommon_N`: 0..3, how many of time, weather and location are uncommon. Accuracies are
    pooled over a partition's images. Standard errors and intervals: bootstrap, with as many images of each partition as
    it has. UserError for unequal lengths and other values.
    """
    correct, uncommon = _zero_one("correct_N", correct_N), _whole_numbers("uncommon_N", uncommon_N)
    _require_equal_lengths(correct_N=correct, uncommon_N=uncommon)
    if wrong := set(np.unique(uncommon).tolist()).difference(range(_PARTITIONS)):
        raise UserError(f"uncommon_N must be 0, 1, 2 or 3, not {min(wrong)}")
    count = np.bincount(uncommon, minlength=_PARTITIONS)
    right = np.bincount(uncommon[correct], minlength=_PARTITIONS)
    # so many right ones has a resample of a partition: no need to draw its images one by one
    rng = np.random.default_rng(seed)
    rates = right / np.maximum(count, 1)
    resampled = np.column_stack([rng.binomial(n, p, _RESAMPLES) for n, p in zip(count, rates, strict=True)])
    whole, whole_error, whole_interval = _retained(right, resampled, count, 3)
    first, first_error, first_interval = _retained(right, resampled, count, 2)
    return ContextScore(
        whole,
        first,
        tuple(100 * float(r / n) if n else None for r, n in zip(right, count, strict=True)),
        tuple(count.tolist()),
        tuple(right.tolist()),
        whole_error,
        whole_interval,
        first_error,
        first_interval,
    )


def background_gap(
    same_correct_N: Any, rand_correct_N: Any, *, paired: bool = True, seed: int = 0
) -> BackgroundGap:
    """BG_Gap on IN-9 (section 4.3, "Background Bias").

    Both bool or 0/1: the images of mixed_same, and those of mixed_rand with the same foregrounds in the same order.
    `paired` False: the two are of unlike foregrounds, may differ in number, and vary independently. UserError for
    unequal lengths of pairs, and other values.
    """
    same, rand = _zero_one("same_correct_N", same_correct_N), _zero_one("rand_correct_N", rand_correct_N)
    if paired:
        _require_equal_lengths(same_correct_N=same, rand_correct_N=rand)
    if not len(same) or not len(rand):
        return BackgroundGap(None, None, None, _percent(same), _percent(rand), len(same))
    error, gaps = (_paired if paired else _unpaired)(same, rand, np.random.default_rng(seed))
    return BackgroundGap(
        100 * float(same.mean() - rand.mean()),
        error,
        _percentiles(100 * gaps) if error is not None else None,
        _percent(same),
        _percent(rand),
        len(same),
    )


def _paired(same: np.ndarray, rand: np.ndarray, rng: np.random.Generator) -> tuple[float | None, np.ndarray]:
    """Standard error in percentage points, and the gaps of resamples of the pairs, as shares."""
    better, worse, count = int((same & ~rand).sum()), int((rand & ~same).sum()), len(same)
    # a resample is known by how many pairs of each kind it has
    drawn = rng.multinomial(count, np.array([better, worse, count - better - worse]) / count, _RESAMPLES)
    return _error_of_mean(same.astype(float) - rand), (drawn[:, 0] - drawn[:, 1]) / count


def _unpaired(
    same: np.ndarray, rand: np.ndarray, rng: np.random.Generator
) -> tuple[float | None, np.ndarray]:
    errors = [_error_of_mean(group.astype(float)) for group in (same, rand)]
    accuracies = [rng.binomial(len(x), x.mean(), _RESAMPLES) / len(x) for x in (same, rand)]
    whole = [error for error in errors if error is not None]
    return math.hypot(*whole) if len(whole) == 2 else None, accuracies[0] - accuracies[1]


def wilson(successes: int, count: int) -> Interval | None:
    """Percent: 95 % interval of a share (Wilson, 1927). None of nothing."""
    if not count:
        return None
    share, z2 = successes / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, float(middle - half)), 100 * min(1.0, float(middle + half))


def _retained(
    right: np.ndarray, resampled: np.ndarray, count: np.ndarray, last: int
) -> tuple[float | None, float | None, Interval | None]:
    """Percent: mean over k = 1..last of the accuracy relative to k = 0; its standard error; its interval.

    A resample without a right image at k = 0 has no value. With more than a few of them there is no interval.
    """
    if not count[: last + 1].all() or not right[0]:
        return None, None, None

    def mean_ratio(right_Rk: np.ndarray) -> np.ndarray:
        accuracy = right_Rk[:, : last + 1] / count[: last + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * (accuracy[:, 1:] / accuracy[:, :1]).mean(axis=1)

    values = mean_ratio(resampled)
    defined = values[resampled[:, 0] > 0]
    value = float(mean_ratio(right[None])[0])
    if len(defined) < _LEAST_DEFINED * len(values):
        return value, None, None
    return value, float(defined.std(ddof=1)), _percentiles(defined)


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _error_of_mean(values: np.ndarray) -> float | None:
    return 100 * float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _percent(correct: np.ndarray) -> float | None:
    return 100 * float(correct.mean()) if len(correct) else None


def _names(**columns: Any) -> Sequence[np.ndarray]:
    arrays = {name: _one_column(name, values) for name, values in columns.items()}
    arrays = {name: np.char.decode(a) if a.dtype.kind == "S" else a for name, a in arrays.items()}
    _require_equal_lengths(**arrays)
    texts = [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]
    if len(arrays[next(iter(arrays))]) and 0 < len(texts) < len(arrays):
        numbers = next(name for name in arrays if name not in texts)
        raise UserError(f"{texts[0]} holds names and {numbers} holds numbers; give both in one form")
    return list(arrays.values())


def _zero_one(name: str, values: Any) -> np.ndarray:
    """(N,) bool."""
    array = _one_column(name, values)
    if len(array) and not np.isin(array, (0, 1)).all():
        raise UserError(f"{name} must be true or false (1 or 0) for each image")
    return array.astype(bool)


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    """(N,) int64."""
    array = _one_column(name, values)
    if len(array) and (array.dtype.kind not in "biuf" or not (array == np.floor(array)).all()):
        raise UserError(f"{name} must be whole numbers")
    return array.astype(np.int64)


def _one_column(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise UserError(f"{name} must have one entry for each image, not the shape {array.shape}")
    return array


def _require_equal_lengths(**columns: np.ndarray) -> None:
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UserError(f"the columns differ in length: {lengths}")
