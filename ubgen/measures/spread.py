"""Diversity of a set of features with intervals, for all samples and class by class."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ubgen.core.errors import UserError
from ubgen.measures.agreement import class_means
from ubgen.measures.diversity import normalised_blocks
from ubgen.measures.intervals import Interval

_Z = 1.959964  # of 95 %
_TINY = 1e-12  # eigenvalues below are rounding


@dataclass(frozen=True)
class Spread:
    """Effective numbers and variance of one set, each with its 95 % interval."""

    samples: int
    rke: Interval
    vendi: Interval
    variance: Interval
    """Mean squared distance of the normalised features to their mean, between 0 and 1."""

    @property
    def vendi_is_limited_by_samples(self) -> bool:
        """Vendi above a tenth of the samples would still rise with more of them."""
        return self.vendi.value > self.samples / 10


def spread(features_ND: Any) -> Spread:
    """RKE and Vendi score (as `rke`, `vendi`) and variance, with intervals by the delta method.

    Resampling with replacement would add copies of samples, and copies lower every one of these. So the spread of each
    statistic comes from its influence function instead: with rho = X^T X / N and x a sample, a sample's influence on
    tr(rho^2) = 1 / RKE is 2 (x^T rho x - tr rho^2), on the entropy log(Vendi) it is -x^T log(rho) x - log(Vendi), and
    on the variance 1 - |mean|^2 it is -2 (x . mean - |mean|^2). Its standard deviation over sqrt(N) is the standard
    error. Intervals of the two effective numbers are symmetric on the log scale. They say how much another draw of N
    samples would differ, and nothing of what more samples would change. UserError as for `rke`.
    """
    count, width = features_ND.shape
    if count < 2:
        raise UserError("an interval needs two samples or more")
    if count <= width:
        return _small(np.concatenate([rows for _, rows in normalised_blocks(features_ND)]))
    rho, mean = np.zeros((width, width)), np.zeros(width)
    for _, rows in normalised_blocks(features_ND):
        rho += rows.T @ rows
        mean += rows.sum(0)
    rho, mean = rho / count, mean / count
    values, vectors = np.linalg.eigh(rho)
    values = np.clip(values, 0, None)
    # x^T log(rho) x, with x in the span of rho, where log(rho) is defined
    logarithm = np.sqrt(-np.log(np.clip(values, _TINY, 1)))
    moments = np.zeros((3, 2))
    for _, rows in normalised_blocks(features_ND):
        rotated = rows @ vectors
        quadratic = np.square(rotated) @ values
        entropy = np.square(rotated * logarithm).sum(1)
        along = rows @ mean
        for i, column in enumerate((quadratic, entropy, along)):
            moments[i] += column.sum(), np.square(column).sum()
    deviations = np.sqrt(np.clip(moments[:, 1] / count - np.square(moments[:, 0] / count), 0, None))
    return _spread(count, values, deviations, float(mean @ mean))


def _small(rows: np.ndarray) -> Spread:
    """From the N x N kernel, whose eigenvectors u give x_i^T f(rho) x_i = N sum_k u_ik^2 s_k f(s_k)."""
    count = len(rows)
    values, vectors = np.linalg.eigh(rows @ rows.T / count)
    values = np.clip(values, 0, None)
    shares = np.square(vectors) * count
    logarithm = -np.log(np.clip(values, _TINY, 1))
    mean = rows.mean(0)
    columns = (shares @ np.square(values), shares @ (values * logarithm), rows @ mean)
    return _spread(count, values, np.array([column.std() for column in columns]), float(mean @ mean))


def _spread(count: int, eigenvalues: np.ndarray, deviations: np.ndarray, squared_mean: float) -> Spread:
    shares = eigenvalues[eigenvalues > 0]
    purity, entropy = float(np.square(shares).sum()), float(-(shares * np.log(shares)).sum())
    errors = deviations / np.sqrt(count) * (2 / purity, 1, 2)
    variance = 1 - squared_mean
    return Spread(
        count,
        _around(1 / purity, errors[0], count),
        _around(float(np.exp(entropy)), errors[1], count),
        Interval(variance, max(0.0, variance - _Z * errors[2]), min(1.0, variance + _Z * errors[2])),
    )


def _around(value: float, log_error: float, most: int) -> Interval:
    factor = float(np.exp(_Z * log_error))
    return Interval(value, max(1.0, value / factor), min(float(most), value * factor))


def within_class_spread(features_ND: Any, labels_N: np.ndarray) -> Interval:
    """`within_class_variance` with its interval, by its influence function: -2 (x . m_c - |m_c|^2) for x of class c.

    The labels count as given. UserError as for `within_class_variance`.
    """
    classes, labels = np.unique(labels_N, return_inverse=True)
    means = class_means(features_ND, labels, len(classes))
    squares = np.square(means).sum(1)[labels]
    total = 0.0
    for start, rows in normalised_blocks(features_ND):
        own = slice(start, start + len(rows))
        total += float(np.square((rows * means[labels[own]]).sum(1) - squares[own]).sum())
    value, error = float(1 - squares.mean()), float(2 * np.sqrt(total) / len(labels))
    return Interval(value, max(0.0, value - _Z * error), min(1.0, value + _Z * error))
