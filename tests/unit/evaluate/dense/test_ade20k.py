"""The reader of ADE20K's layout: labels, what is ignored, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.evaluate.dense.ade20k import IGNORED, open_ade20k

MASK = "annotations/training/ADE_train_00000001.png"


def test_other_becomes_ignored_and_classes_begin_at_0(ade: Path) -> None:
    raw = np.array(Image.open(ade / MASK))
    raw[5, 5] = IGNORED
    Image.fromarray(raw).save(ade / MASK)
    training, validation = open_ade20k(ade)
    image, labels = training.read(0)
    assert image.shape == (40, 56, 3)
    assert (len(training), len(validation), training.class_names) == (6, 3, ("sky", "earth", "box"))
    assert (labels[raw == 0] == IGNORED).all()
    assert labels[5, 5] == IGNORED
    kept = (raw > 0) & (raw < IGNORED)
    np.testing.assert_array_equal(labels[kept], raw[kept] - 1)


def test_a_palette_mask_is_read_by_its_indices(ade: Path) -> None:
    before = open_ade20k(ade)[0].read(0)[1]
    mask = Image.open(ade / MASK).convert("L")
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(ade / MASK)
    assert Image.open(ade / MASK).mode == "P"
    np.testing.assert_array_equal(open_ade20k(ade)[0].read(0)[1], before)


def test_the_release_has_150_classes(ade: Path) -> None:
    (ade / "objectInfo150.txt").unlink()
    assert len(open_ade20k(ade)[0].class_names) == 150


def of_another_size(ade: Path) -> None:
    Image.new("L", (40, 56)).save(ade / MASK)


def of_unknown_label(ade: Path) -> None:
    Image.new("L", (56, 40), 4).save(ade / MASK)


def of_colours(ade: Path) -> None:
    Image.new("RGB", (56, 40)).save(ade / MASK)


def without_mask(ade: Path) -> None:
    (ade / MASK).unlink()


def without_image(ade: Path) -> None:
    (ade / "images/training/ADE_train_00000001.jpg").unlink()


def without_part(ade: Path) -> None:
    (ade / "annotations").rename(ade / "other")


def damaged(ade: Path) -> None:
    (ade / MASK).write_bytes((ade / MASK).read_bytes()[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_size, "00000001.png is 40 x 56 pixels, but its image ADE_train_00000001.jpg is 56 x 40"),
        (of_unknown_label, "holds label 4, but there are 3 classes"),
        (of_colours, "is of mode RGB; expected an index mask"),
        (without_mask, "ADE_train_00000001.png is missing; there is an image of that name"),
        (without_image, "ADE_train_00000001.jpg is missing; there is a mask of that name"),
        (without_part, "expected the layout of ADEChallengeData2016"),
        (damaged, "ADE_train_00000001.png cannot be read as an image"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(ade: Path, change, message: str) -> None:
    change(ade)
    with pytest.raises(UserError, match=message) as error:
        open_ade20k(ade)[0].read(0)
    assert "\n" not in str(error.value)
