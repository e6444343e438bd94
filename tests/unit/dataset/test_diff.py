"""What `diff` tells apart."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ubgen.dataset.tools.diff import diff

Change = Callable[[int, dict[str, Any]], None]


def nudge(position: int, sample: dict[str, Any]) -> None:
    """One pixel of sample 7 by one grey level, one by 9."""
    if position == 7:
        pixels = np.asarray(sample["image"]).astype(np.int16)
        pixels[0, 0, 1] += 1 if pixels[0, 0, 1] < 255 else -1
        pixels[3, 3, 2] += 9 if pixels[3, 3, 2] < 240 else -9
        sample["image"] = Image.fromarray(pixels.astype(np.uint8))


def test_same_bytes(tmp_path: Path, make: Callable[..., Path]) -> None:
    result = diff(make(tmp_path / "a"), make(tmp_path / "b"))
    assert result.same_bytes
    assert result.agrees()
    assert (result.samples, result.share, result.psnr, result.plan) == (12, 1.0, math.inf, [])


def test_pixels_to_the_level(tmp_path: Path, make: Callable[..., Path]) -> None:
    a, b = (
        make(tmp_path / name, change=change, extension="png") for name, change in [("a", keep), ("b", nudge)]
    )
    result = diff(a, b)
    pixels = 6 * 16 * 16  # of the one shard that differs
    assert (result.samples, result.images, result.pixels, result.largest) == (12, 1, pixels, 9)
    assert result.within == pixels - 1
    assert result.lowest_share == 1 - 1 / 256
    assert result.psnr == pytest.approx(10 * math.log10(255**2 / ((81 + 1) / (3 * pixels))))
    assert not result.agrees()
    assert result.agrees(0.999)
    assert not result.agrees(0.9999)
    assert diff(a, b, levels=9).agrees(1.0)
    assert result.examples == ["000000007: image, by up to 9"]
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("labels", lambda position, s: s.update(class_index=1 - s["class_index"]) if position == 3 else None),
        ("prompts", lambda position, s: s["meta"].update(prompt="other") if position == 3 else None),
        ("flags", lambda position, s: s.update(flag="quality") if position == 3 else None),
        ("sizes", lambda position, s: s.update(image=Image.new("RGB", (8, 8))) if position == 3 else None),
    ],
)
def test_what_is_not_a_pixel(tmp_path: Path, make: Callable[..., Path], what: str, change: Change) -> None:
    result = diff(make(tmp_path / "a"), make(tmp_path / "b", change=change))
    counts = {name: getattr(result, name) for name in ("labels", "prompts", "flags", "sizes")}
    assert counts == {**dict.fromkeys(counts, 0), what: 1}
    assert result.agrees(0.5) == (what == "flags")


def test_scores_and_plan(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["scores"]["quality"] += position / 100
        if position == 5:
            sample["scores"]["late"] = 1.0

    a, b = make(tmp_path / "a"), make(tmp_path / "b", change=change)
    run = b / "run.json"
    run.write_text(run.read_text().replace('"--seed": 0', '"--seed": 1'))
    result = diff(a, b)
    assert result.plan == ["--seed"]
    assert result.scores == pytest.approx({"quality": 0.11, "clip_similarity": 0, "late": math.inf})
    assert result.images == 0
    assert result.to_dict()["scores"]["late"] is None


def test_samples_that_one_side_lacks(tmp_path: Path, make: Callable[..., Path]) -> None:
    a, b = make(tmp_path / "a", shards=3), make(tmp_path / "b", per_shard=8)
    result = diff(a, b)
    assert (result.samples, result.only_a, result.only_b) == (16, 2, 0)
    assert not result.agrees(0.0)


def keep(position: int, sample: dict[str, Any]) -> None:
    pass
