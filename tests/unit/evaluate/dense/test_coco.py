"""The reader of COCO's layout: which images and objects train, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from ubgen.core.errors import UserError
from ubgen.evaluate.dense.coco import open_coco


def test_labels_are_contiguous_in_the_order_of_the_files_ids(coco: Path) -> None:
    training, validation = open_coco(coco)
    assert training.category_ids == validation.category_ids == (3, 18, 90)
    assert training.target(0)["labels"].tolist() == [1, 3]  # of the ids 3 and 90
    assert training.class_names[2] == "toothbrush"


def test_boxes_and_masks_of_polygons_are_pycocotools_own(coco: Path) -> None:
    training, _ = open_coco(coco)
    target = training.target(0)
    peer = COCO(coco / "annotations" / "instances_train2017.json")
    assert target["boxes"].tolist() == [[4, 6, 24, 22], [30, 8, 54, 38]]
    for mask, each in zip(target["masks"], peer.loadAnns(peer.getAnnIds(imgIds=[1])), strict=True):
        np.testing.assert_array_equal(mask, peer.annToMask(each))


@pytest.mark.parametrize("compressed", [False, True])
def test_masks_of_run_lengths(coco_with: Callable[..., Path], compressed: bool) -> None:
    wanted = np.zeros((48, 64), np.uint8)
    wanted[10:20, 5:30] = 1
    wanted[12:14, 8:12] = 0  # a hole
    packed = masks.encode(np.asfortranarray(wanted))
    runs: Any = {"size": [48, 64], "counts": packed["counts"].decode()}
    if not compressed:
        flat = np.concatenate([[0], wanted.ravel(order="F"), [2]])
        edges = np.flatnonzero(np.diff(flat))
        runs["counts"] = np.diff(np.concatenate([[0], edges])).tolist()
    training, _ = open_coco(coco_with(lambda c: c["annotations"][0].update(segmentation=runs)))
    np.testing.assert_array_equal(training.target(0)["masks"][0], wanted)


def test_images_without_boxes_and_crowds_are_treated_as_the_peers_do(coco: Path) -> None:
    training, validation = open_coco(coco)
    # image 5 has no annotation; image 6 keeps its place with a crowd alone, and has no object
    assert [image["id"] for image in training.images] == [1, 2, 3, 4, 6]
    assert training.target(4)["boxes"].shape == (0, 4)
    assert training.target(4)["masks"].shape == (0, 64, 48)
    assert len(training.target(1)["labels"]) == 1  # beside its crowd
    assert len(validation) == 3  # all of them
    assert any(each["iscrowd"] for each in validation.content["annotations"])  # left to pycocotools
    assert len(training.target(3)["labels"]) == 1  # the empty box is none


def test_small_images_are_left_out(coco: Path) -> None:
    assert [image["id"] for image in open_coco(coco, least_side=49)[0].images] == [4]
    with pytest.raises(UserError, match="no image has an annotation and sides of at least 65"):
        open_coco(coco, least_side=65)


def unknown_category(content: dict[str, Any]) -> None:
    content["annotations"][0]["category_id"] = 91


def unknown_image(content: dict[str, Any]) -> None:
    content["annotations"][0]["image_id"] = 77


def mask_of_another_size(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = {"size": [64, 48], "counts": [64 * 48]}


def image_of_another_size(content: dict[str, Any]) -> None:
    content["images"][0]["width"] = 63


def without_categories(content: dict[str, Any]) -> None:
    del content["categories"]


def without_boxes(content: dict[str, Any]) -> None:
    del content["annotations"][2]["bbox"]


def other_categories(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 91, "name": "more"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (unknown_category, "annotation 1 has category 91, which the file does not list"),
        (unknown_image, "annotation 1 is of image 77, which is not listed"),
        (mask_of_another_size, r"annotation 1 has a mask of size \[64, 48\], but its image .* is \[48, 64\]"),
        (image_of_another_size, "000000000001.jpg is 64 x 48 pixels, but .* says 63 x 48"),
        (without_categories, "is not a COCO file of instances"),
        (without_boxes, "annotations without bbox"),
        (other_categories, "have different categories"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    coco_with: Callable[..., Path], edit: Callable[..., None], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_coco(coco_with(edit))[0].pixels(0)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(coco: Path) -> None:
    image, file = coco / "train2017/000000000003.jpg", coco / "annotations/instances_train2017.json"
    training, _ = open_coco(coco)
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"000000000003.jpg cannot be read as an image"):
        training.pixels(2)
    image.unlink()
    with pytest.raises(UserError, match=r"000000000003.jpg is missing; .* lists it"):
        open_coco(coco)
    file.write_text(file.read_text()[:-30])
    with pytest.raises(UserError, match="is not valid JSON"):
        open_coco(coco)
    file.unlink()
    with pytest.raises(UserError, match=r"no .*instances_train2017.json; expected COCO's layout"):
        open_coco(coco)


def test_a_polygon_that_is_none(coco_with: Callable[..., Path]) -> None:
    training, _ = open_coco(coco_with(lambda c: c["annotations"][0].update(segmentation=[[1, 2]])))
    with pytest.raises(UserError, match="annotation 1: its mask cannot be read"):
        training.target(0)


def test_wide_images_are_told_from_high_ones(coco: Path) -> None:
    assert open_coco(coco)[0].wide.tolist() == [True, False, True, True, False]


def test_the_digest_follows_the_annotations(coco: Path, coco_with: Callable[..., Path]) -> None:
    changed = coco_with(lambda content: content["annotations"].pop())
    assert open_coco(coco)[0].digest != open_coco(changed)[0].digest
    assert json.loads((coco / "annotations/instances_val2017.json").read_text())["images"]
    assert Image.open(coco / "val2017/000000000001.jpg").size == (64, 48)
