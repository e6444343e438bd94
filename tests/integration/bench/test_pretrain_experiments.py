"""The pre-training experiments, in runs that are too short to say anything."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench/pretrain_experiments.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_experiments", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pretrain_experiments", found)
    spec.loader.exec_module(found)
    return found


def write_fashion(root: Path) -> Path:
    """Files of the form of Fashion-MNIST's, with 5 images of each class."""
    root.mkdir()
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(10, dtype=np.uint8), 5)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (len(labels), 28, 28), np.uint8)
        for name, head, content in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (root / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + content.tobytes()))
    return root


def test_intervals_hold_the_mean_and_shrink_with_the_number_of_images(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    few, many = (script.figures(rng.random((3, n)) < 0.7) for n in (100, 10_000))
    for found in (few, many):
        low, high = found["interval"]
        assert low < np.mean(found["seeds"]) < high
    assert few["interval"][1] - few["interval"][0] > 5 * (many["interval"][1] - many["interval"][0])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["worlds", "fashion"])
def test_an_experiment_is_run_and_continued(
    script: ModuleType, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["--seeds", "1", "2", "--per-class", "5", "--validation", "3", "--epochs", "2"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    source = ["--fashion-mnist", str(write_fashion(tmp_path / "source"))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--experiments", experiment, *size, *places, *source])
    script.main()
    first = json.loads((tmp_path / "out" / "pretrain.json").read_text())[experiment]
    for row in first.values():
        for figures in row.values():
            assert len(figures["seeds"]) == 2
            assert figures["interval"][0] <= np.mean(figures["seeds"]) <= figures["interval"][1]
    written = tmp_path / "out" / "pretrain.md"
    written.write_text(written.read_text() + "\n## Reading\n\nRead so.\n")
    script.main()  # all is finished: the same figures, and what was written by hand stays
    assert json.loads((tmp_path / "out" / "pretrain.json").read_text())[experiment] == first
    assert written.read_text().endswith("Read so.\n")
    assert "## Protocol" in written.read_text()
