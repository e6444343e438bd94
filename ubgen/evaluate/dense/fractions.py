"""Shares of a dataset's training images."""

from collections.abc import Sequence

import numpy as np


def image_share(names: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a share of the images, at least one: round(fraction x number) of them.

    Of one seed, a smaller share is part of every larger one. The draw depends on the names, not on their order.
    """
    by_name = np.array(sorted(range(len(names)), key=names.__getitem__))
    shuffled = np.random.default_rng([seed, 0xF2AC]).permutation(by_name)
    return np.sort(shuffled[: max(1, round(fraction * len(names)))])
