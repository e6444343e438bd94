"""How far two sets of images are apart, from their features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ubgen.core.errors import UserError

_ROWS = 2048  # of a block of distances


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Frechet distance of the two normal distributions with the sets' means and covariances; 0 for equal ones.

    The formula of FID (Heusel et al. 2017), on any features, as they are. Its bias grows with D / N: compare sets of
    the same size. UserError for fewer than two samples, or features that are not finite.
    """
    (mean_a, root), (mean_b, covariance) = _moments(a_ND), _moments(b_MD)
    values, vectors = np.linalg.eigh(root)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance @ root), 0, None)).sum()
    distance = np.square(mean_a - mean_b).sum() + values.sum() + np.trace(covariance) - 2 * cross
    return float(max(distance, 0.0))


def _moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance (divisor N - 1) in float64."""
    count, width = np.shape(features_ND)
    if count < 2:
        raise UserError("a distance of two sets needs two samples or more in each")
    mean = sum(rows.sum(0) for _, rows in _blocks(features_ND, 65_536)) / count
    covariance = np.zeros((width, width))
    for _, rows in _blocks(features_ND, 65_536):
        rows = rows - mean
        covariance += rows.T @ rows
    return mean, covariance / (count - 1)


def kid(a_ND: np.ndarray, b_MD: np.ndarray, *, limit: int = 20_000, seed: int = 0) -> float:
    """Kernel distance: the unbiased estimate of the squared maximum mean discrepancy; about 0 for equal distributions.

    Kernel (x . y / D + 1)^3 on the features as they are (Binkowski et al. 2018). At most `limit` samples of each set
    are used, drawn with `seed`. UserError for fewer than two samples, or features that are not finite.
    """
    a, b = (
        _subset(features, limit, np.random.default_rng((seed, i))) for i, features in enumerate((a_ND, b_MD))
    )
    if min(len(a), len(b)) < 2:
        raise UserError("a distance of two sets needs two samples or more in each")
    within = sum(_kernel_sum(x, x, diagonal=False) / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(within - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: np.ndarray, b: np.ndarray, diagonal: bool = True) -> float:
    total = 0.0
    for _, rows in _blocks(a, _ROWS):
        total += float(np.power(rows @ b.T / a.shape[1] + 1, 3).sum())
    if not diagonal:
        total -= float(np.power(np.square(a).sum(1) / a.shape[1] + 1, 3).sum())
    return total


def _subset(features_ND: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    chosen = np.arange(len(features_ND))
    if len(chosen) > limit:
        chosen = np.sort(rng.choice(chosen, limit, replace=False))
    return _finite(np.asarray(features_ND[chosen], np.float64), 0)


@dataclass(frozen=True)
class Manifold:
    """How two sets overlap; precision, recall and coverage in [0, 1], density about 1 for equal distributions."""

    precision: float
    """Share of the samples that lie within the reference's manifold."""
    recall: float
    """Share of the reference that lies within the samples' manifold."""
    density: float
    """In how many of the reference's balls a sample lies, divided by k."""
    coverage: float
    """Share of the reference's balls with a sample in them."""


def manifold(features_ND: np.ndarray, reference_MD: np.ndarray, k: int = 5) -> Manifold:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its samples, up to the k-th nearest other sample of the set, without
    the border, by Euclidean distance of the features as they are. Values depend on N and M: compare sets of the same
    size. Time and not memory grows with N x M. UserError for a set of k samples or fewer, or features not finite.
    """
    samples, reference = (np.asarray(x, np.float64) for x in (features_ND, reference_MD))
    if k < 1 or min(len(samples), len(reference)) <= k:
        raise UserError(f"each set needs more than {k} samples, and k must be at least 1")
    of_samples, of_reference = _radii(samples, k), _radii(reference, k)
    within, covered, recalled = np.zeros(len(samples)), [], []
    for start, rows in _blocks(reference, _ROWS):
        distances = _squared_distances(rows, samples)
        inside = distances < of_reference[start : start + len(rows), None]
        within += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances < of_samples).any(1))
    return Manifold(
        precision=float((within > 0).mean()),
        recall=float(np.concatenate(recalled).mean()),
        density=float(within.mean() / k),
        coverage=float(np.concatenate(covered).mean()),
    )


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """(N,) squared distance of each sample to the k-th nearest other one."""
    found = []
    for start, rows in _blocks(features, _ROWS):
        distances = _squared_distances(rows, features)
        distances[np.arange(len(rows)), start + np.arange(len(rows))] = -1  # itself
        found.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(found)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0, None)


def _blocks(features_ND: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows in float64)."""
    for start in range(0, len(features_ND), size):
        yield start, _finite(np.asarray(features_ND[start : start + size], np.float64), start)


def _finite(rows: np.ndarray, start: int) -> np.ndarray:
    if (wrong := np.flatnonzero(~np.isfinite(rows).all(1))).size:
        raise UserError(f"the features of sample {start + wrong[0]} are not finite")
    return rows
