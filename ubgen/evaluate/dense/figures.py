"""AP of detections by pycocotools, and mean intersection over union of a confusion matrix."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np

_NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def average_precision(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: Literal["bbox", "segm"]
) -> dict[str, float]:
    """COCO's figures in percent, by name, of detections in COCO's result format; NaN where nothing is annotated.

    `truth` is the content of an instances file. Crowds are left to pycocotools: what falls on them does not count.
    """
    from pycocotools.coco import COCO  # of the extra "dense"
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        known = COCO()
        # pycocotools takes both for granted; it adds keys of its own to the annotations
        known.dataset = {
            "info": {},
            **truth,
            "annotations": [{"iscrowd": 0, **a} for a in truth["annotations"]],
        }
        known.createIndex()
        if not detections:
            return dict.fromkeys(_NAMES, 0.0)
        # the size of a mask, not of its box, says whether it is small
        left_out = "bbox" if kind == "segm" else "segmentation"
        found = known.loadRes([{k: v for k, v in each.items() if k != left_out} for each in detections])
        judge = COCOeval(known, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = [float(value) for value in judge.stats[: len(_NAMES)]]
    return {
        name: 100 * value if value >= 0 else float("nan") for name, value in zip(_NAMES, values, strict=True)
    }


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64 counts of pixels: rows are labels, columns predictions. Labels of K or more are left out."""
    counted = labels < classes
    at = labels[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(at, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """(K,) in percent, NaN for a class that is neither labelled nor predicted."""
    hits = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hits
    with np.errstate(invalid="ignore"):
        return 100 * hits / np.where(union, union, np.nan)


def segmentation_figures(counts: np.ndarray) -> dict[str, float]:
    """mIoU, the mean over the classes that occur; mAcc, over the labelled ones; aAcc, of all pixels."""
    hits, labelled = np.diag(counts), counts.sum(1)
    with np.errstate(invalid="ignore"):
        accuracy = 100 * hits / np.where(labelled, labelled, np.nan)
    return {
        "mIoU": float(np.nanmean(intersection_over_union(counts))),
        "mAcc": float(np.nanmean(accuracy)),
        "aAcc": float(100 * hits.sum() / max(counts.sum(), 1)),
    }
