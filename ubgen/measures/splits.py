"""Draws of samples, class by class or by name. Each is determined by the labels or names, and a seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ubgen.core.errors import UserError

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def few_shot_subset(labels: ArrayLike, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a share of the samples, the same share of each class.

    A class of n samples gives round(fraction * n), halves up, at least 2, or all where it has fewer. For one seed a
    smaller fraction is a subset of a larger one. UserError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction of training images must be above 0 and at most 1, not {fraction}")
    sizes = _class_sizes(labels)
    return draw_per_class(labels, np.maximum(np.floor(fraction * sizes + 0.5 + _ROUNDING), 2), seed)


def stratified_validation(labels: ArrayLike, share: float, seed: int) -> np.ndarray:
    """Sorted indices of the validation samples: floor(share * n) of each class of n samples, at least one.

    A class of one sample gives none: it is needed for training. UserError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise UserError(f"the share of validation images must be above 0 and below 1, not {share}")
    sizes = _class_sizes(labels)
    counts = np.maximum(np.floor(share * sizes + _ROUNDING), 1)
    return draw_per_class(labels, np.minimum(counts, sizes - 1), seed, stream=1)


def draw_per_class(labels: ArrayLike, counts: ArrayLike, seed: int, *, stream: int = 0) -> np.ndarray:
    """Sorted indices of `counts` samples of each class, or all of a class that has fewer.

    `counts` is one number, or one for each class in sorted order. For one seed a draw with smaller counts is a subset
    of a draw with larger ones; draws of different streams are independent. The random numbers are those of Philox,
    whose raw stream NumPy keeps the same from version to version.
    """
    classes = _classes(labels)
    raw = np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=(stream,))).random_raw(len(classes))
    order = np.lexsort((raw, classes))
    sizes = np.bincount(classes)
    rank = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    wanted = np.broadcast_to(np.asarray(counts, np.int64), sizes.shape)
    return np.sort(order[rank < wanted[classes[order]]])


def apportion(labels: ArrayLike, total: int) -> np.ndarray:
    """(K,) counts that sum to `total`, in proportion to the classes' sizes: the largest remainders are rounded up."""
    sizes = _class_sizes(labels)
    exact = sizes * total / sizes.sum()
    counts = np.floor(exact + _ROUNDING).astype(np.int64)
    up = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[up] += 1
    return counts


def image_share(names: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a share of the images, at least one: round(fraction x number) of them.

    Of one seed, a smaller share is part of every larger one. The draw depends on the names, not on their order.
    """
    by_name = np.array(sorted(range(len(names)), key=names.__getitem__))
    shuffled = np.random.default_rng([seed, 0xF2AC]).permutation(by_name)
    return np.sort(shuffled[: max(1, round(fraction * len(names)))])


def _classes(labels: ArrayLike) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or not len(found):
        raise UserError(f"labels must be one row of at least one sample, not of shape {found.shape}")
    return np.unique(found, return_inverse=True)[1]


def _class_sizes(labels: ArrayLike) -> np.ndarray:
    return np.bincount(_classes(labels))
