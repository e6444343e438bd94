"""Sizes, crops and colours of the training images."""

from dataclasses import replace

import numpy as np
import pytest

from ubgen.evaluate.dense.settings import SegmentSettings
from ubgen.evaluate.dense.transforms import (
    crop_place,
    fitted_size,
    flipped,
    photometric,
    resized,
    resized_mask,
    training_crop,
)


@pytest.mark.parametrize(
    ("size", "wanted"), [((480, 640), (512, 683)), ((640, 480), (683, 512)), ((200, 1600), (256, 2048))]
)
def test_the_shape_is_kept_within_both_limits(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert fitted_size(size, 512, 2048) == wanted


def test_a_flip_moves_boxes_with_their_masks() -> None:
    mask = np.zeros((1, 20, 30), np.uint8)
    mask[0, 4:9, 3:13] = 1
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    target = {"boxes": np.array([[3, 4, 13, 9]], np.float32), "labels": np.array([2]), "masks": mask}
    image, moved = flipped(pixels, target)
    columns = np.flatnonzero(moved["masks"][0].any(0))
    assert moved["boxes"].tolist() == [[columns[0], 4, columns[-1] + 1, 9]]
    assert (image[:, 0] == pixels[:, -1]).all()
    assert target["boxes"].tolist() == [[3, 4, 13, 9]]  # as it was


def test_no_class_fills_a_crop_if_another_place_is_found() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1
    for seed in range(20):
        top, left = crop_place(mask, 32, np.random.default_rng(seed))
        part = mask[top : top + 32, left : left + 32]
        assert part.shape == (32, 32)
        assert 0.25 < part.mean() < 0.75
    assert crop_place(np.zeros((64, 64), np.uint8), 32, np.random.default_rng(0))  # there is no such place


def test_pixels_without_a_label_do_not_count_for_the_share() -> None:
    mask = np.full((32, 64), 255, np.uint8)
    mask[:, 0], mask[:, 63] = 0, 1
    places = {crop_place(mask, 64, np.random.default_rng(seed)) for seed in range(3)}
    assert places == {(0, 0)}


@pytest.mark.parametrize("seed", range(4))
def test_crops_hold_image_and_mask_alike(seed: int) -> None:
    settings = replace(SegmentSettings(crop=32, short_side=40, long_side=160))
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 10:60] = 1
    mask[:, 70:] = 2
    pixels = np.stack([mask * 100] * 3, axis=2)
    image, labels = training_crop(pixels, mask, settings, np.random.default_rng(seed))
    assert image.shape == (*labels.shape, 3)
    assert max(labels.shape) <= 32
    assert set(np.unique(labels)) <= {0, 1, 2}
    again = training_crop(pixels, mask, settings, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, again[0])
    if len(np.unique(labels)) > 1:  # brighter where the label is higher, whatever became of the colours
        means = [image[labels == label].mean() for label in np.unique(labels)]
        assert means == sorted(means)


def test_colours_change_within_their_limits() -> None:
    pixels = np.full((4, 4, 3), (120, 100, 80), np.uint8)
    results = [photometric(pixels, np.random.default_rng(seed))[0, 0].astype(int) for seed in range(200)]
    same = sum((result == pixels[0, 0]).all() for result in results)
    assert 2 <= same <= 30  # all four are left out once in sixteen
    grey = np.full((4, 4, 3), 100, np.uint8)
    brightness = [int(photometric(grey, np.random.default_rng(seed))[0, 0, 0]) for seed in range(300)]
    assert min(brightness) < 60
    assert max(brightness) > 150
    assert max(brightness) <= 1.5 * 132 + 1
    assert min(brightness) >= 0.5 * 68 - 1


def test_resizing_is_opencvs_bilinear() -> None:
    """Halving takes the mean of two by two pixels; the nearest pixel for masks."""
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    half = resized(pixels, (2, 2))
    means = pixels.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - means).max() <= 0.5
    assert set(np.unique(resized_mask(np.array([[0, 9], [9, 0]], np.uint8), (7, 5)))) == {0, 9}
