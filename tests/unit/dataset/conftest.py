"""Small datasets, written as the stage writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ubgen.core.stage import Stage
from ubgen.dataset import ShardWriter, write_classes

HOSTILE = [
    "a/b",
    "../../etc/passwd",
    "..",
    "line\nbreak",
    "\u202eright to left",
    "x" * 300,
    "nul\0 $x$",
    "<script>alert(1)</script> | [a](b) `c`",
    "日本語 مرحبا é",
    "\ud800 lone",
]


def picture(position: int, size: int = 16) -> Image.Image:
    """Smooth noise of its own for every position, hard for JPEG to make equal."""
    noise = np.random.default_rng(position).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def score(position: int) -> float:
    return (position * 7 % 20) / 4


@pytest.fixture
def make() -> Callable[..., Path]:
    """make(out, names, ...): position p has class p % len(names), like the plan's order."""

    def make(
        out: Path,
        names: Sequence[str] = ("cat", "dog"),
        shards: int = 2,
        per_shard: int = 6,
        extension: str = "jpg",
        ids: Sequence[str] | None = None,
        change: Callable[[int, dict[str, Any]], None] = lambda position, sample: None,
    ) -> Path:
        """`change` may edit image, label, meta, scores and flag of a sample before it is written."""
        ids = ids or [f"n{i:03d}" for i in range(len(names))]
        images = shards * per_shard
        with Stage(out, "synth", {"--per-class": images // len(names), "--seed": 0}).hold() as stage:
            stage.begin()
            write_classes(out, ids, names, names)
            for shard in range(shards):
                with ShardWriter(out, shard, extension) as writer:
                    for position in range(shard * per_shard, (shard + 1) * per_shard):
                        label = position % len(names)
                        sample: dict[str, Any] = {
                            "image": picture(position),
                            "class_index": label,
                            "meta": {"class_id": ids[label], "prompt": names[label]},
                            "scores": {"clip_similarity": score(position) / 10, "quality": score(position)},
                            "flag": None,
                        }
                        change(position, sample)
                        writer.write(position, **sample)
                    writer.reject(
                        {"class_index": 0, "image_index": shard, "attempt": 0, "reason": "constant"}
                    )
            stage.finish({}, dataset={"shards": shards, "images": images, "classes": len(names)})
        return out

    return make


@pytest.fixture
def hostile() -> list[str]:
    return list(HOSTILE)
