"""`ubgen-bench pretrain` on a few small images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.benchmark import bench_pretrain
from ubgen.core.errors import UserError


def test_every_loader_is_measured(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "a" / f"{i}.jpg")
    settings = {"image_size": 16, "batches": 2, "rounds": 2, "workers": (1,)}
    result = bench_pretrain(tmp_path / "data", batch=4, gpus=2, step_seconds=0.5, **settings)
    assert {"threads", "timm create_loader"} <= set(result.rates)
    assert all(
        len(rates) == 2 and min(rates) > 0 for side in result.rates.values() for rates in side.values()
    )
    workers, rate = result.best("threads")
    assert workers == 1
    assert result.cores_needed() == pytest.approx(16 * result.machine["cores"] / rate)
    result.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretrain.json").read_text())["settings"]["batch"] == 4
    assert "| threads | 1 |" in (tmp_path / "out" / "pretrain.md").read_text()
    with pytest.raises(UserError, match="at least two batches"):
        bench_pretrain(tmp_path / "data", batch=5, **settings)
