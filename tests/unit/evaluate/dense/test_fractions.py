"""Shares of the images, and what they mean for the number of updates."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ubgen.core.errors import UserError
from ubgen.evaluate.dense.settings import (
    DenseRun,
    DetectSettings,
    SegmentSettings,
    segmentation_updates,
    updates_per_epoch,
)
from ubgen.measures.splits import image_share

NAMES = [f"{i:012}.jpg" for i in range(1000)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_are_nested_and_of_the_right_size(seed: int) -> None:
    shares = [set(image_share(NAMES, fraction, seed).tolist()) for fraction in (1.0, 0.5, 0.2, 0.1)]
    assert [len(share) for share in shares] == [1000, 500, 200, 100]
    assert all(small < large for large, small in pairwise(shares))


def test_a_share_follows_the_seed_and_the_names_alone() -> None:
    first = image_share(NAMES, 0.2, 0)
    assert not np.array_equal(first, image_share(NAMES, 0.2, 1))
    turned = NAMES[::-1]
    assert {turned[i] for i in image_share(turned, 0.2, 0)} == {NAMES[i] for i in first}
    assert len(image_share(NAMES[:3], 0.1, 0)) == 1


@pytest.mark.parametrize(("fraction", "updates"), [(1.0, 87960), (0.5, 43980), (0.2, 17592), (0.1, 8796)])
def test_updates_of_detection_shrink_with_the_images(fraction: float, updates: int) -> None:
    """COCO's 117,266 annotated training images: 7,330 updates an epoch, 12 epochs."""
    settings = DetectSettings()
    images = round(117_266 * fraction)
    assert settings.epochs * updates_per_epoch(images, settings) == updates


@pytest.mark.parametrize(
    ("fraction", "updates"), [(1.0, 160_000), (0.5, 80_000), (0.2, 32_000), (0.1, 16_000)]
)
def test_updates_of_segmentation_shrink_with_the_fraction(fraction: float, updates: int) -> None:
    assert segmentation_updates(fraction, SegmentSettings()) == updates
    assert segmentation_updates(fraction, SegmentSettings(iterations=80_000)) == updates // 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, "--fraction must be above 0 and at most 1, not 0"),
        ({"fraction": 1.5}, "--fraction"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"stop_after": 0}, "--stop-after must be positive"),
    ],
)
def test_options_without_sense_are_refused(changes: dict[str, float], message: str, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        replace(DenseRun("x", tmp_path), **changes).check()
    with pytest.raises(UserError, match="--long-side must be at least --short-side"):
        DetectSettings(short_side=100, long_side=50)
    with pytest.raises(UserError, match="--crop must be positive"):
        SegmentSettings(crop=0)
