"""A loader's memory does not grow over an epoch."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.probes import dali
from ubgen.loading.imageset import open_image_set
from ubgen.pretrain import training_batches


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["threads", "dali"])
def test_memory_is_flat_over_an_epoch(tmp_path: Path, loader: str) -> None:
    """Within 5 % after the first 200 batches of 600."""
    if loader == "dali" and not dali().available:
        pytest.skip(dali().detail)
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4800):
        buffer = io.BytesIO()
        size = tuple(rng.integers(80, 160, 2))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(buffer, "JPEG")
        (tmp_path / "a" / f"{i}.jpg").write_bytes(buffer.getvalue())
    batches = training_batches(
        open_image_set(tmp_path), batch_size=8, image_size=64, loader=loader, threads=2
    )
    held = [resident() for _ in batches]
    assert len(held) == 600
    assert max(held[200:]) < 1.05 * max(held[:200])
