"""`ubgen-bench pretrain` on a few small images."""

import json
import statistics
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
    assert {"threads", "timm create_loader"} <= set(result.turns)
    assert {*result.turns, *result.missing} == {"threads", "timm create_loader", "DALI", "SPDL"}
    for side in result.turns:
        (turns,) = result.turns[side].values()
        assert len(turns) == len(result.ratios(side, 1)) == 2
        assert all(turn.rate > 0 and turn.cpu > 0 for turn in turns)
    assert result.ratios("timm create_loader", 1) == [(1, 1), (1, 1)]
    workers, rate = result.best("threads")
    assert workers == 1
    assert rate == statistics.median(turn.rate for turn in result.turns["threads"][1])
    cpu = statistics.median(turn.cpu for turn in result.turns["threads"][1])
    assert result.cores_needed() == pytest.approx(16 * cpu / 1000)
    result.write(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "pretrain-loaders.json").read_text())
    assert written["settings"]["batch"] == 4
    assert "| threads | 1 |" in (tmp_path / "out" / "pretrain-loaders.md").read_text()
    with pytest.raises(UserError, match="at least two batches"):
        bench_pretrain(tmp_path / "data", batch=5, **settings)
