import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ubgen.miniature.scenes import Scene, ade20k, coco, draw_scene, index_mask, run_lengths
from ubgen.miniature.shapes import CLASSES, NOVEL_CLASSES
from ubgen.miniature.world import SCENES, stream

COUNT = 60


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    """The scenes of COCO's training split, again."""
    return [draw_scene(stream(1, "coco/train", i)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> COCO:
    root: Path = tmp_path_factory.mktemp("coco")
    *images, (name, content) = coco(1, COUNT, "train")
    assert name == "annotations/instances_train2017.json"
    assert isinstance(content, bytes)
    (root / "instances.json").write_bytes(content)
    assert [name for name, _ in images] == [
        f"train2017/{entry['file_name']}" for entry in json.loads(content)["images"]
    ]
    return COCO(root / "instances.json")


def test_pycocotools_decodes_every_annotation_to_the_drawn_mask(loaded: COCO, drawn: list[Scene]) -> None:
    kinds = {"polygon": 0, "runs": 0, "crowd": 0}
    for image, scene in zip(loaded.loadImgs(loaded.getImgIds()), drawn, strict=True):
        assert (image["height"], image["width"]) == scene.pixels.shape[:2]
        instances = [i for i in scene.instances if CLASSES[i.label] in NOVEL_CLASSES]
        annotations = loaded.loadAnns(loaded.getAnnIds(image["id"]))
        for annotation, instance in zip(annotations, instances, strict=True):
            decoded = loaded.annToMask(annotation).astype(bool)
            overlap = (decoded & instance.mask).sum() / (decoded | instance.mask).sum()
            polygon = isinstance(annotation["segmentation"], list)
            kinds["polygon" if polygon else "crowd" if annotation["iscrowd"] else "runs"] += 1
            assert overlap > 0.85 if polygon else overlap == 1
            assert loaded.loadCats(annotation["category_id"])[0]["name"] == CLASSES[instance.label]
            assert annotation["area"] == instance.mask.sum()
            box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8))))
            assert annotation["bbox"] == box.tolist()
    assert min(kinds.values()) >= 2, kinds


def test_categories_are_not_numbered_from_one_and_some_images_are_empty(loaded: COCO) -> None:
    assert sorted(loaded.getCatIds()) == list(range(11, 21))
    assert {entry["category_id"] for entry in loaded.loadAnns(loaded.getAnnIds())} == set(range(11, 21))
    per_image = [len(loaded.getAnnIds(number)) for number in loaded.getImgIds()]
    assert min(per_image) == 0
    assert max(per_image) >= 4
    assert len({(entry["width"], entry["height"]) for entry in loaded.loadImgs(loaded.getImgIds())}) == 3


def test_the_two_splits_share_no_image_number() -> None:
    numbers = [
        {entry["id"] for entry in json.loads(list(coco(0, 30, split))[-1][1])["images"]}  # type: ignore[arg-type]
        for split in ("train", "val")
    ]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(share: float) -> None:
    mask = np.random.default_rng(0).uniform(size=(7, 11)) < share
    runs = run_lengths(mask)
    assert runs["size"] == [7, 11]
    assert sum(runs["counts"]) == 77
    decoded = coco_mask.decode(coco_mask.frPyObjects(runs, 7, 11))
    assert np.array_equal(decoded.astype(bool), mask)


def test_index_masks_hold_backgrounds_then_novel_classes_and_zero_elsewhere(drawn: list[Scene]) -> None:
    values = set()
    for scene in drawn:
        mask = index_mask(scene)
        assert mask.dtype == np.uint8
        assert mask.shape == scene.pixels.shape[:2]
        values |= set(np.unique(mask).tolist())
        untouched = ~np.logical_or.reduce([np.zeros_like(mask, bool), *(i.mask for i in scene.instances)])
        assert np.array_equal(mask[untouched], scene.stuff[untouched] + 1)
        for instance in scene.instances:
            name = CLASSES[instance.label]
            wanted = 9 + NOVEL_CLASSES.index(name) if name in NOVEL_CLASSES else 0
            assert (mask[instance.mask] == wanted).all()
    assert values == set(range(19))


def test_the_background_under_an_index_is_that_scene(drawn: list[Scene]) -> None:
    """Mean colours of the regions, over many pictures, agree with the renderer's themes."""
    means = {}
    for k in range(len(SCENES)):
        regions = [scene.pixels[index_mask(scene) == k + 1] for scene in drawn]
        means[SCENES[k]] = np.concatenate(regions).mean(axis=0)
    assert means["snow"].min() > 200
    assert means["night"].max() < 100
    assert means["grass"].argmax() == 1
    assert means["water"].argmax() == 2
    assert means["brick"].argmax() == 0
    assert means["sand"][0] > 180 > means["sand"][2]


def test_ade20k_has_a_mask_for_each_image_and_names_for_the_indices() -> None:
    files = dict(ade20k(2, 3, "validation"))
    assert [name for name in files if name.startswith("images/")] == [
        f"images/validation/ADE_val_{i:08}.jpg" for i in (1, 2, 3)
    ]
    for i in (1, 2, 3):
        picture, mask = (
            files[f"{kind}/validation/ADE_val_{i:08}.{ending}"]
            for kind, ending in (("images", "jpg"), ("annotations", "png"))
        )
        assert isinstance(picture, np.ndarray)
        assert isinstance(mask, np.ndarray)
        assert picture.shape[:2] == mask.shape
    text = files["objectInfo150.txt"]
    assert isinstance(text, bytes)
    rows = [line.split("\t") for line in text.decode().splitlines()]
    assert rows[0] == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [(int(row[0]), row[-1]) for row in rows[1:]] == list(enumerate((*SCENES, *NOVEL_CLASSES), 1))


def test_index_masks_survive_their_file() -> None:
    mask = index_mask(draw_scene(stream(0, "x", 0)))
    from ubgen.miniature.benchmarks import encode

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(mask, ".png")))), mask)
