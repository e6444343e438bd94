"""Figures of a dataset, by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ubgen.core.errors import UserError
from ubgen.dataset import dataset_stats, open_dataset


def test_figures_are_those_of_the_scores(tmp_path: Path, make: Callable[..., Path]) -> None:
    dataset = open_dataset(make(tmp_path / "d", ["a", "b", "c"]))
    entries = list(dataset.entries())
    labels = np.array([e.class_index for e in entries])
    quality = np.array([e.scores["quality"] for e in entries])
    stats = dataset_stats(dataset)
    assert (stats["images"], stats["class_counts"], stats["flagged"]) == (12, [4, 4, 4], 0)
    assert stats["rejected"] == {"constant": 2}
    assert stats["scores"] == ["clip_similarity", "quality"]
    figures = stats["quality"]
    assert figures["count"] == 12
    assert [figures[name] for name in ("mean", "std", "min", "max")] == pytest.approx(
        [quality.mean(), quality.std(), quality.min(), quality.max()]
    )
    assert figures["class_means"] == pytest.approx([quality[labels == i].mean() for i in range(3)])
    assert figures["quantiles"]["0.5"] == pytest.approx(np.median(quality))
    histogram = figures["histogram"]
    assert (sum(histogram["counts"]), len(histogram["counts"])) == (12, 50)
    assert (histogram["low"], histogram["high"]) == (quality.min(), quality.max())
    json.dumps(stats, allow_nan=False)


def test_no_digit_is_lost(tmp_path: Path, make: Callable[..., Path]) -> None:
    values = np.random.default_rng(0).normal(2, 1, 12)

    def change(position: int, sample: dict[str, Any]) -> None:
        sample["scores"] = {"quality": float(values[position])}

    figures = dataset_stats(open_dataset(make(tmp_path / "d", per_shard=6, shards=2, change=change)))[
        "quality"
    ]
    assert (figures["min"], figures["max"]) == (values.min(), values.max())
    assert [figures["mean"], figures["std"]] == pytest.approx([values.mean(), values.std()], rel=1e-14)
    quantiles = [np.quantile(values, float(q)) for q in figures["quantiles"]]
    assert list(figures["quantiles"].values()) == pytest.approx(quantiles, rel=1e-14)
    assert figures["histogram"]["counts"] == np.histogram(values, 50)[0].tolist()


def test_missing_scores_flags_and_empty_classes(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["class_index"] = min(sample["class_index"], 1)
        if position == 1:
            sample["scores"]["quality"] = float("nan")
        if position == 11:
            sample["scores"]["late"] = 2.5
            sample["flag"] = "quality"
        del sample["scores"]["clip_similarity"]

    stats = dataset_stats(open_dataset(make(tmp_path / "d", ["a", "b", "nothing"], change=change)))
    assert (stats["class_counts"], stats["flagged"]) == ([4, 8, 0], 1)
    assert (stats["quality"]["count"], stats["late"]["count"]) == (11, 1)
    assert stats["quality"]["class_means"][2] is None
    assert (stats["late"]["mean"], sum(stats["late"]["histogram"]["counts"])) == (2.5, 1)


def test_a_dataset_without_scores(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["scores"] = {"quality": None} if position else {}

    stats = dataset_stats(open_dataset(make(tmp_path / "d", change=change)))
    assert (stats["quality"]["count"], stats["quality"]["mean"], stats["quality"]["histogram"]) == (
        0,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"class_index":1', '"class_index":7', "names a class that classes.json does not have"),
        ('"class_index":1', '"class_index":"', "is damaged"),
        ('"samples":[{', '"samples":[[', "is damaged"),
    ],
)
def test_a_tampered_sidecar_is_one_line(
    tmp_path: Path, make: Callable[..., Path], old: str, new: str, message: str
) -> None:
    out = make(tmp_path / "d")
    sidecar = out / "shard-000000.json"
    sidecar.write_text(sidecar.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        dataset_stats(open_dataset(out))
    assert "\n" not in str(caught.value)
