"""Whether labels agree with features: the nearest class mean, two-cluster classes, and near-duplicates."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ubgen.measures.diversity import normalised_blocks

_ROWS = 2048
LEAST = 30
"""Samples, of which `two_clusters` has a view: of a normal distribution, under 1 % then have a separation of 0.8."""


def class_means(features_ND: Any, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """(K, D) float64: the means of the normalised features; NaN for a class without a sample."""
    sums = np.zeros((classes, features_ND.shape[1]))
    for start, rows in normalised_blocks(features_ND):
        labels = labels_N[start : start + len(rows)]
        order = np.argsort(labels, kind="stable")
        first = np.flatnonzero(np.diff(labels[order], prepend=-1))
        sums[labels[order[first]]] += np.add.reduceat(rows[order], first)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(labels_N, minlength=classes)[:, None]


def nearest_class(features_ND: Any, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """(N,) the class whose mean has the largest cosine with the sample, which is left out of its own class's mean.

    A classifier of the nearest centroid (scikit-learn's NearestCentroid on normalised means), with leave-one-out. A
    class whose only sample is left out cannot be found.
    """
    counts = np.bincount(labels_N, minlength=classes)
    sums = np.nan_to_num(class_means(features_ND, labels_N, classes)) * counts[:, None]
    lengths = np.linalg.norm(sums, axis=1)
    found = np.empty(len(labels_N), np.int64)
    for block, rows in normalised_blocks(features_ND):
        for start in range(0, len(rows), _ROWS):
            x = rows[start : start + _ROWS]
            own = labels_N[block + start : block + start + len(x)]
            products = x @ sums.T
            each = np.arange(len(x))
            mine = products[each, own].copy()
            with np.errstate(divide="ignore", invalid="ignore"):
                cosines = products / lengths
                # (s - x) . x / |s - x|, with |x| = 1
                apart = np.sqrt(np.clip(np.square(lengths[own]) - 2 * mine + 1, 0, None))
                cosines[each, own] = np.where(counts[own] > 1, (mine - 1) / apart, -np.inf)
            cosines[:, counts == 0] = -np.inf
            found[block + start : block + start + len(x)] = np.nan_to_num(cosines, nan=-np.inf).argmax(1)
    return found


@dataclass(frozen=True)
class TwoClusters:
    """A set of samples split in two."""

    assigned: np.ndarray
    """(N,) bool: whether a sample is in the second cluster."""
    means: np.ndarray
    """(2, D) of the normalised features."""
    separation: float
    """Share of the variance along the line through the means that lies between the clusters, on samples that did not
    choose the line: 2 / pi = 0.64 for a normal distribution, 0.75 for a uniform one, 1 for two points."""
    smaller: float
    """Share of the samples in the smaller cluster."""


def two_clusters(features_ND: np.ndarray, seed: int = 0) -> TwoClusters | None:
    """2-means of normalised features; None for fewer than 30 samples.

    In many dimensions 2-means finds a gap between any two groups of few samples. So the separation is measured across
    halves: the line comes from one half of the samples, and the other half is projected on it and split at the best
    place; then the halves change roles, and the lower figure counts.
    """
    if len(features_ND) < LEAST:
        return None
    x = np.concatenate([rows for _, rows in normalised_blocks(features_ND)])
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    halves = order[::2], order[1::2]
    figures = []
    for chosen, held in (halves, halves[::-1]):
        split = _two_means(x[chosen], rng)
        line = x[chosen][split].mean(0) - x[chosen][~split].mean(0)
        figures.append(_best_split(x[held] @ line))
    assigned = _two_means(x, rng)
    share = float(assigned.mean())
    means = np.stack([x[~assigned].mean(0), x[assigned].mean(0)])
    return TwoClusters(assigned, means, min(figures), min(share, 1 - share))


def _two_means(x: np.ndarray, rng: np.random.Generator, starts: int = 4) -> np.ndarray:
    """Lloyd's algorithm, the best of a few starts; (N,) bool with both values."""
    best, least = np.arange(len(x)) >= len(x) // 2, np.inf
    for _ in range(starts):
        first = x[rng.integers(len(x))]
        distances = np.square(x - first).sum(1)
        if not distances.sum():
            continue
        centres = np.stack([first, x[rng.choice(len(x), p=distances / distances.sum())]])  # k-means++
        split = np.zeros(len(x), bool)
        for _ in range(50):
            gap = (
                x @ (centres[1] - centres[0])
                - (np.square(centres[1]).sum() - np.square(centres[0]).sum()) / 2
            )
            if (gap > 0).all() or (gap <= 0).all() or ((gap > 0) == split).all():
                break
            split = gap > 0
            centres = np.stack([x[~split].mean(0), x[split].mean(0)])
        if split.any() and not split.all():
            inertia = sum(float(np.square(part - part.mean(0)).sum()) for part in (x[split], x[~split]))
            if inertia < least:
                best, least = split, inertia
    return best


def _best_split(values: np.ndarray) -> float:
    """Largest share of the variance between the two sides of a threshold (Otsu's criterion)."""
    ordered = np.sort(values)
    count, total = len(ordered), ordered.var()
    if total <= 1e-18:
        return 0.0
    left = np.arange(1, count)
    sums = np.cumsum(ordered)[:-1]
    gap = sums / left - (ordered.sum() - sums) / (count - left)
    return float((left * (count - left) / count**2 * np.square(gap)).max() / total)


def near_pairs(
    features_ND: np.ndarray, threshold: float, most: int = 1000
) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """Which samples (N,) bool have another one with a cosine of at least `threshold`; and the `most` nearest pairs.

    Pairs are (i, j, cosine), i < j, the nearest first. All N (N - 1) / 2 pairs are looked at.
    """
    x = np.concatenate([rows for _, rows in normalised_blocks(features_ND)]).astype(np.float32)
    near, found = np.zeros(len(x), bool), list[tuple[int, int, float]]()
    for start in range(0, len(x), _ROWS):
        cosines = x[start : start + _ROWS] @ x[start:].T
        above = np.argwhere(np.triu(cosines >= threshold, 1))
        near[start + above.ravel()] = True
        values = cosines[above[:, 0], above[:, 1]]
        order = np.argsort(-values, kind="stable")[:most]
        found += [
            (start + int(i), start + int(j), float(v))
            for (i, j), v in zip(above[order], values[order], strict=True)
        ]
        found = sorted(found, key=lambda pair: -pair[2])[:most]
    return near, found
