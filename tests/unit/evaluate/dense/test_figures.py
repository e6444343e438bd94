"""AP beside pycocotools' own, mIoU beside torchmetrics'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ubgen.evaluate.dense.coco import open_coco
from ubgen.evaluate.dense.figures import (
    average_precision,
    confusion,
    intersection_over_union,
    segmentation_figures,
)


def detections(coco: Path, shift: int) -> list[dict]:
    """Each object of the training images, moved; and a false one."""
    training, _ = open_coco(coco)
    found = []
    for index, image in enumerate(training.images):
        target = training.target(index)
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            moved = np.asfortranarray(np.roll(mask, shift, 1))
            runs = masks.encode(moved)
            found.append(
                {
                    "image_id": image["id"],
                    "category_id": training.category_ids[label - 1],
                    "bbox": masks.toBbox(runs).tolist(),
                    "score": 0.9 - 0.1 * len(found),
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    return [*found, {**found[0], "category_id": 90, "score": 0.95}]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("shift", [0, 3])
def test_ap_is_pycocotools_own(coco: Path, tmp_path: Path, kind: str, shift: int) -> None:
    found = detections(coco, shift)
    file, results = coco / "annotations/instances_train2017.json", tmp_path / "results.json"
    without = [{k: v for k, v in each.items() if kind == "bbox" or k != "bbox"} for each in found]
    results.write_text(json.dumps(without))
    peer = COCO(file)
    judge = COCOeval(peer, peer.loadRes(str(results)), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    ours = average_precision(json.loads(file.read_text()), found, kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        list(ours.values()), [100 * x if x >= 0 else np.nan for x in judge.stats[:6]], rtol=1e-12
    )
    assert 0 < ours["AP"] < 100
    assert (ours["AP"] > 60) == (shift == 0)


def test_crowds_are_no_objects_to_find(coco: Path) -> None:
    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    found = detections(coco, 0)[:-1]
    real = average_precision(content, found, "bbox")
    assert real["AP"] < 100  # of the empty box alone: nothing can find it
    content["annotations"] = [each for each in content["annotations"] if each["bbox"][2]]
    assert average_precision(content, found, "bbox")["AP"] == pytest.approx(100)
    assert average_precision(content, found, "segm")["AP"] == pytest.approx(100)
    assert average_precision(content, [], "bbox")["AP"] == 0


def test_mean_iou_is_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 6, (2, 40, 50)), rng.integers(0, 6, (2, 40, 50))
    predicted[labels == 2] = 2
    labels[:, :5] = 255
    counts = sum(confusion(a, b, 6) for a, b in zip(labels, predicted, strict=True))
    ours = segmentation_figures(counts)
    pair = torch.from_numpy(predicted), torch.from_numpy(labels)
    iou = MulticlassJaccardIndex(6, average=None, ignore_index=255)(*pair)
    np.testing.assert_allclose(intersection_over_union(counts), 100 * iou.numpy(), rtol=1e-5)
    macro = MulticlassJaccardIndex(6, average="macro", ignore_index=255)(*pair)
    assert ours["mIoU"] == pytest.approx(100 * float(macro), rel=1e-5)
    for name, average in (("mAcc", "macro"), ("aAcc", "micro")):
        peer = MulticlassAccuracy(6, average=average, ignore_index=255)(*pair)
        assert ours[name] == pytest.approx(100 * float(peer), rel=1e-5)


def test_a_class_that_never_occurs_does_not_count() -> None:
    counts = confusion(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 3]), 4)
    np.testing.assert_allclose(intersection_over_union(counts), [50, 50, np.nan, np.nan])
    assert segmentation_figures(counts)["mIoU"] == 50
    counts = confusion(np.array([0, 0, 1]), np.array([0, 1, 3]), 4)  # 3 is predicted only
    assert segmentation_figures(counts)["mIoU"] == pytest.approx(100 * (0.5 + 0 + 0) / 3)
