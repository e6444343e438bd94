"""Accuracies, and bootstrap intervals over test samples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES, LEVEL = 1000, 0.95
_AT_ONCE = 1 << 22  # counts in work at a time: 32 MB


class Interval(NamedTuple):
    """A statistic of the samples, and the ends of its percentile interval."""

    value: float
    low: float
    high: float


def top1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples whose prediction is the label, in 0..1."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def mean_per_class(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that occur in `labels` of the share of their samples that are predicted, in 0..1."""
    correct = np.asarray(predicted) == np.asarray(labels)
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]
    return float(np.mean(np.bincount(classes, correct) / np.bincount(classes)))


def bootstrap_mean(
    values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of `values` (N,) and its interval."""
    column = np.asarray(values, np.float64)[:, None]
    return interval(float(column.mean()), resampled_means(column, resamples, seed)[:, 0], level)


def bootstrap_mean_per_class(
    values: ArrayLike,
    labels: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The mean over classes of the class means of `values` (N,). A class that a resample lacks does not count in it."""
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]
    order = np.argsort(classes, kind="stable")
    sorted_values = np.asarray(values, np.float64)[order]
    starts = np.flatnonzero(np.diff(classes[order], prepend=-1))
    means = []
    for counts in _resampled_counts(len(order), resamples, seed):
        sizes = np.add.reduceat(counts, starts, axis=1)
        sums = np.add.reduceat(counts * sorted_values, starts, axis=1)
        means.append(
            np.divide(sums, sizes, out=np.zeros_like(sums), where=sizes > 0).sum(1) / (sizes > 0).sum(1)
        )
    of_all = np.add.reduceat(sorted_values, starts) / np.diff(starts, append=len(order))
    return interval(float(of_all.mean()), np.concatenate(means), level)


def resampled_means(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(R, M): the means of each column of `values` (N, M) in each resample of the rows.

    A ratio of two counts is a ratio of two such columns.
    """
    columns = np.asarray(values, np.float64)
    parts = [counts @ columns / len(columns) for counts in _resampled_counts(len(columns), resamples, seed)]
    return np.concatenate(parts)


def interval(value: float, resampled: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of a statistic from its values (R,) in the resamples."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _resampled_counts(samples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(r, N) how often each sample occurs in each resample, a few resamples at a time; R in all."""
    rng = np.random.default_rng(seed % 2**64)
    at_once = max(1, _AT_ONCE // samples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(0, samples, (rows, samples)) + samples * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples)
