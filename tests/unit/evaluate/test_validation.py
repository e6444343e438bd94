"""Accuracy on validation sets: matched by class id, top-1 and top-5, raw and averaged weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, Warned
from ubgen.evaluate.validation import open_validation, rank_of, validation

IMAGENET, HUNDRED = load_classes("imagenet1k").ids, load_classes("imagenet100").ids

pytestmark = pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")


def test_ranks_are_scikit_learns_top_k():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 20)), rng.integers(0, 20, 500)
    rank = rank_of(logits, labels)
    for k in (1, 2, 5):
        theirs = top_k_accuracy_score(labels, logits, k=k, labels=range(20))
        assert (rank < k).mean() == pytest.approx(theirs)
    assert ((rank == 0) == (logits.argmax(1) == labels)).all()


def test_equal_logits_count_as_argmax_takes_them():
    logits, labels = np.zeros((3, 10), np.float32), np.array([0, 1, 5])
    assert rank_of(logits, labels).tolist() == [0, 1, 5]


@pytest.fixture
def folder(tmp_path, paint):
    """Three classes of a validation set of one's own; of five images three are what their directory says."""
    for name, wnid, shown in [
        ("a", IMAGENET[5], IMAGENET[5]),
        ("b", IMAGENET[5], IMAGENET[6]),
        ("a", IMAGENET[700], IMAGENET[700]),
        ("a", IMAGENET[999], IMAGENET[999]),
        ("b", IMAGENET[999], IMAGENET[0]),
    ]:
        paint(tmp_path / "mine" / "val" / wnid / f"{name}.png", shown, (40, 40))
    return tmp_path


def test_top_1_and_top_5_by_class_id(folder, seer):
    data = open_validation("mine", folder)
    result = validation(seer(), data, "mine")
    assert result.main.value == 60.0
    assert list(result.figures) == ["top-1", "top-5"]
    assert result.figures["top-5"].value == 80.0  # class 6 is near class 5; class 0 is far from 999
    assert dict(result.counts) == {"images": 5, "classes": 3, "outputs": 1000}
    shuffled = np.random.default_rng(0).permutation(1000)
    backbone = seer()
    backbone.network.colours = backbone.network.colours[torch.from_numpy(shuffled)]
    other = replace(backbone, class_ids=tuple(IMAGENET[i] for i in shuffled))
    again = validation(other, data, "mine")
    assert again.figures == result.figures
    assert again.predictions["predicted"].tolist() == result.predictions["predicted"].tolist()


def test_raw_weights_beside_the_average(folder, seer):
    data = open_validation("mine", folder)
    raw = seer(identity="sha256:raw")
    raw.network.colours = raw.network.colours.flip(0)
    result = validation(seer(), data, "mine", raw=raw)
    assert list(result.figures) == ["top-1", "top-5", "raw top-1", "raw top-5"]
    assert result.main.value == 60.0
    assert result.figures["raw top-1"].value == 20.0  # class 0, shown in the directory of 999
    assert sorted(result.predictions["raw predicted"]) == sorted(
        IMAGENET[999 - i] for i in (5, 6, 700, 999, 0)
    )
    assert result.predictions["raw correct"].sum() == 1


def test_few_classes_have_no_top_5(tmp_path, seer, paint):
    ids = IMAGENET[:4]
    for wnid in ids:
        paint(tmp_path / "mine" / wnid / "1.png", wnid, (40, 40))
    result = validation(seer(ids), open_validation("mine", tmp_path), "mine")
    assert list(result.figures) == ["top-1"]
    assert result.main.value == 100.0


@pytest.fixture
def imagenet(tmp_path, paint):
    for wnid in IMAGENET:
        paint(tmp_path / "imagenet" / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", wnid, (8, 8))
    return tmp_path


def test_imagenet_and_its_hundred_classes(imagenet, seer, paint):
    with pytest.warns(Warned, match="1,000 images of imagenet; released are 50,000"):
        data = open_validation("imagenet", imagenet)
    assert validation(seer(), data, "imagenet").main.value == 100.0
    with pytest.warns(Warned, match="100 images of imagenet100; released are 5,000"):
        hundred = open_validation("imagenet100", imagenet)
    assert hundred.class_ids == HUNDRED
    backbone = seer()
    backbone.network.colours = backbone.network.colours[[IMAGENET.index(i) for i in HUNDRED]]
    small = replace(backbone, class_ids=HUNDRED, outputs=100)
    result = validation(small, hundred, "imagenet100")
    assert result.main.value == 100.0
    assert dict(result.counts) == {"images": 100, "classes": 100, "outputs": 100}
    with pytest.raises(
        UserError, match=r"backbone seer lacks 900 of the 1000 classes of .*, such as 'n01440764'"
    ):
        validation(small, data, "imagenet")
    paint(imagenet / "imagenet100" / "val" / HUNDRED[0] / "1.png", HUNDRED[0])
    with pytest.raises(
        UserError, match=r"imagenet100/val lacks 99 of 100 classes, such as '.*named by class id"
    ):
        open_validation("imagenet100", imagenet)


def test_missing_and_wrong_directories_are_one_line(tmp_path, paint):
    with pytest.raises(UserError, match="imagenet is missing; expected imagenet/val/<class>/ with"):
        open_validation("imagenet", tmp_path)
    with pytest.raises(UserError, match=r"imagenet100/val/<class>/ or imagenet/val/<class>/ with"):
        open_validation("imagenet100", tmp_path)
    paint(tmp_path / "imagenet" / "val" / "tench" / "1.png", IMAGENET[0])
    with pytest.raises(UserError, match="lacks 1000 of 1000 classes, such as 'n01440764'"):
        open_validation("imagenet", tmp_path)
