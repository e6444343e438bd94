"""The training of Mask R-CNN beside a plain loop: both sides see the same images, and the page comes out."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ubgen.evaluate.dense.settings import DetectSettings
from ubgen.evaluate.dense.tasks import open_detection
from ubgen.miniature.benchmarks import encode
from ubgen.miniature.scenes import coco

pytest.importorskip("pycocotools", reason="pycocotools is not installed")
SCRIPT = Path(__file__).resolve().parents[3] / "bench/dense_speed.py"
RECIPE = """
[detect]
batch_size = 1
short_side = 64
long_side = 96
anchor = 8
channels = 16
hidden = 16
rois = 16
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dense_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dense_speed", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 30), ("val", 1)):
        for name, content in coco(0, count, split):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else encode(content, path.suffix))
    return root


@pytest.mark.parametrize("flip", [False, True])
def test_both_sides_see_the_same_images_and_objects(script: ModuleType, scenes: Path, flip: bool) -> None:
    class Drawn:
        def uniform(self) -> float:
            return 0.0 if flip else 1.0

    [task] = open_detection(scenes, DetectSettings(), 1.0, [0])
    plain = script.peer_dataset(task, flip=float(flip))
    for position, index in enumerate(task.chosen):
        image, target = task.sample(int(index), Drawn())
        peer_image, peer_target = plain[position]
        assert (image - peer_image).abs().max() <= 3 / 255  # two decoders of JPEG
        assert target.keys() == peer_target.keys()
        for name, values in target.items():
            torch.testing.assert_close(peer_target[name], values, rtol=0, atol=0)


def test_the_script_times_both_sides_and_writes_its_page(
    script: ModuleType, scenes: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    given = script.Arguments(scenes, recipe=str(recipe), updates=10, rounds=1, out=tmp_path / "out")
    result = script.measure(given)
    result.write(given.out)
    turns = json.loads((given.out / "dense-speed.json").read_text())["turns"]
    for what in ("training", "loading alone"):
        rates = [turns[what][side][0]["rate"] for side in ("ubgen", "plain loop")]
        assert np.isfinite(rates).all()
        assert min(rates) > 0
        assert result.ratios(what)[0].rate == pytest.approx(rates[0] / rates[1])
    page = (given.out / "dense-speed.md").read_text()
    assert "| training |" in page
    assert "batches of 1" in page
