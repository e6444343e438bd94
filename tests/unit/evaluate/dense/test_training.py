"""The training loop, and the two commands: plans, resuming, results, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ubgen.cli.eval import main
from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError
from ubgen.core.metrics import read_metrics
from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.dense.plan import train_and_measure
from ubgen.evaluate.dense.settings import DenseRecipe, DenseRun, DetectSettings, SegmentSettings
from ubgen.evaluate.dense.tasks import Task, open_detection, open_segmentation
from ubgen.evaluate.dense.training import batch_plan, loaded_ahead
from ubgen.evaluate.results import stored

DETECT = DetectSettings(
    batch_size=2, epochs=2, drops=(1,), warmup=2, short_side=64, long_side=96, anchor=8, channels=16, hidden=16,
    rois=16, evaluate_every=2, checkpoint_every=2,
)  # fmt: skip
SEGMENT = SegmentSettings(
    batch_size=2, iterations=8, short_side=40, long_side=160, crop=64, channels=16, auxiliary_channels=8,
    evaluate_every=9, checkpoint_every=2,
)  # fmt: skip


def run(data: Path, out: Path, **more) -> DenseRun:
    return DenseRun("random:test_resnet@1", data, out, device="cpu", threads=1, **more)


@pytest.mark.parametrize(("count", "size"), [(50, 8), (48, 8), (5, 8), (17, 4)])
def test_a_plan_uses_every_image_once_and_fills_the_last_batch(count: int, size: int) -> None:
    wide = np.arange(count) % 3 > 0
    for kinds in (None, wide):
        batches = batch_plan(count, size, 0, 3, kinds)
        assert [len(batch) for batch in batches] == [size] * -(-count // size)
        assert np.bincount(np.concatenate(batches), minlength=count).min() == 1
        assert sum(map(len, batches)) - count < size
        again = np.concatenate(batch_plan(count, size, 0, 4, kinds))
        assert not np.array_equal(np.concatenate(batches), again)


def test_batches_hold_images_of_one_kind() -> None:
    wide = np.arange(100) % 3 > 0
    mixed = [len(set(wide[batch])) > 1 for batch in batch_plan(100, 8, 0, 0, wide)]
    assert sum(mixed) <= 2
    assert not any(mixed[:-2])


def test_loading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(loaded_ahead(lambda i: i * i, range(20), threads=3, ahead=5)) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(loaded_ahead(lambda i: 1 // i, [2, 1, 0], threads=2, ahead=2))


def test_learning_rates(coco: Path, ade: Path) -> None:
    """1x: warm-up over 500 updates from a thousandth, drops after 8 and 11; poly: 0.01 to 1e-4, power 0.9."""
    task = open_detection(coco, DetectSettings(), 1.0, [0])[0]
    task = replace(task, chosen=np.arange(16 * 100))  # 100 updates an epoch
    assert task.updates == 1200
    rates = [task.lr(done) for done in (0, 499, 799, 800, 1099, 1100)]
    np.testing.assert_allclose(rates, [2e-5, 0.02, 0.02, 0.002, 0.002, 0.0002])
    smaller = replace(task, settings=DetectSettings(batch_size=8))
    assert smaller.lr(600) == pytest.approx(0.01)
    poly = open_segmentation(ade, SegmentSettings(), 0.5, [0])[0]
    assert poly.updates == 80_000
    np.testing.assert_allclose([poly.lr(0), poly.lr(40_000)], [0.01, 0.0099 * 0.5**0.9 + 1e-4])


@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_a_continued_training_ends_with_the_same_bits(
    coco: Path, ade: Path, tmp_path: Path, kind: str
) -> None:
    data, settings = (coco, DETECT) if kind == "detect" else (ade, SEGMENT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train_and_measure(run(data, whole), settings)[0]
    for _ in range(2):
        assert train_and_measure(run(data, parts, stop_after=2), settings) == []
    assert train_and_measure(run(data, parts), settings)[0].figures == result.figures
    (one,), (two,) = (list((out / "training").iterdir()) for out in (whole, parts))
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines, others = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert lines[-1] == others[-1]
    assert lines[-1]["phase"] == "eval"
    pictures = sorted(path.name for path in (two / "pictures").iterdir())
    assert pictures == [f"epoch-{epoch:04}.png" for epoch in range(1, 1 + len(pictures))]
    assert len(pictures) == (2 if kind == "detect" else 3)
    assert Image.open(two / "pictures" / pictures[0]).size == (3 * 256, 512)
    assert list((two / "tensorboard").iterdir())
    assert not (two / "checkpoint.pt").exists()


def test_results_of_some_seeds_and_a_fraction(ade: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train_and_measure(run(ade, out, fraction=0.5, seeds=2), SEGMENT)[0]
    assert (result.evaluation, result.dataset) == ("segment", "ade20k-0.5x")
    assert result.counts["training images"] == 3
    assert result.counts["updates"] == 4  # half of 8
    values = [result.details["seeds"][seed]["mIoU"] for seed in ("0", "1")]
    assert result.main.value == pytest.approx(np.mean(values))
    lists = json.loads((out / "splits/segment-ade20k-0.5x.json").read_text())
    assert [len(names) for names in lists.values()] == [3, 3]
    assert set(lists["training, seed 0"]) != set(lists["training, seed 1"])
    table = (out / "results.md").read_text()
    assert "means over the seeds" in table
    assert "| ResNet50, IN-ubGen | 41.50 | 38.61 | 33.57 | 27.82 |" in table
    before = (out / "figures/segment-ade20k-0.5x.json").stat().st_mtime_ns
    train_and_measure(run(ade, out, fraction=0.5, seeds=2), SEGMENT)  # nothing to do
    assert (out / "figures/segment-ade20k-0.5x.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="with other settings"):
        train_and_measure(run(ade, out, fraction=0.5, seeds=2), replace(SEGMENT, lr=0.02))
    found = stored(out, "segment-ade20k-0.5x")
    assert found is not None


def test_an_unfinished_training_with_other_settings_is_kept(ade: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_and_measure(run(ade, out, stop_after=2), SEGMENT)
    with pytest.raises(UserError, match=r"another configuration \(settings.lr was 0.01, now 0.02\)"):
        train_and_measure(run(ade, out), replace(SEGMENT, lr=0.02))
    with pytest.raises(UserError, match=r"another configuration \(backbone was sha256"):
        train_and_measure(replace(run(ade, out), backbone="random:test_resnet@2"), SEGMENT)
    train_and_measure(run(ade, out, stop_after=1, overwrite=True), replace(SEGMENT, lr=0.02))
    checkpoint = next((out / "training").iterdir()) / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["done"] == 1
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint.pt: damaged checkpoint"):
        train_and_measure(run(ade, out), replace(SEGMENT, lr=0.02))


def test_a_loss_that_is_not_finite_stops(ade: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"update \d+: the loss is not finite; .*--lr"):
        train_and_measure(run(ade, tmp_path / "out"), replace(SEGMENT, lr=1e30))


def test_a_missing_image_stops_before_training(ade: Path, tmp_path: Path) -> None:
    (ade / "images/training/ADE_train_00000002.jpg").unlink()
    with pytest.raises(UserError, match=r"ADE_train_00000002.jpg is missing"):
        train_and_measure(run(ade, tmp_path / "out"), SEGMENT)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_normalised_is_refused(ade: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch-size 1 on 1 process.* needs 2 images or more"):
        train_and_measure(run(ade, tmp_path / "out"), replace(SEGMENT, batch_size=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_two_processes_train_and_measure_together(coco: Path, ade: Path, tmp_path: Path, kind: str) -> None:
    """The figures are those that one process measures with the same weights."""
    shared = "--batch-size 4 --channels 16 --short-side 40 --long-side 160 --device cpu --threads 1"
    own = {
        "detect": "--epochs 1 --warmup 0 --anchor 8 --hidden 16 --rois 16",
        "segment": "--iterations 4 --crop 64 --auxiliary-channels 8",
    }
    options = f"{shared} {own[kind]}".split()
    data = ade if kind == "segment" else coco
    options += ["--backbone", "random:test_resnet@1", "--data", str(data), "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = subprocess.run(
        [*launch, "-m", "ubgen.cli.eval", kind, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    (trained,) = (tmp_path / "two/training").iterdir()
    found = json.loads((trained / "manifest.json").read_text())
    task: Task
    if kind == "segment":
        settings = SegmentSettings(channels=16, short_side=40, long_side=160, auxiliary_channels=8)
        task = open_segmentation(data, settings, 1.0, [0])[0]
    else:
        small = DetectSettings(channels=16, short_side=40, long_side=160, anchor=8, hidden=16)
        task = open_detection(data, small, 1.0, [0])[0]
    network = task.build(load_backbone("random:test_resnet@1", device="cpu")).eval()
    network.load_state_dict(load_file(trained / "model.safetensors"))
    with torch.no_grad():
        alone = task.measure(network, torch.device("cpu"), (0, 1), map)
    assert found["updates"] == (4 if kind == "segment" else 2)
    assert found["figures"] == pytest.approx(alone, nan_ok=True)


@pytest.mark.slow
def test_both_tasks_learn_what_they_see(coco: Path, ade: Path, tmp_path: Path) -> None:
    """Rectangles in three colours, and sky above earth, with a backbone that begins at random."""
    detect = replace(
        DETECT, batch_size=4, epochs=40, drops=(35,), warmup=10, anchor=16, channels=32, hidden=64, rois=32,
        frozen_stages=0, frozen_norm=False, lr=0.08, evaluate_every=40,
    )  # fmt: skip
    segment = replace(SEGMENT, batch_size=4, iterations=60, channels=32, lr=0.04, evaluate_every=30)
    found = train_and_measure(run(coco, tmp_path / "detect"), detect)[0].figures
    assert found["box AP"].value > 25
    assert found["mask AP"].value > 25
    assert train_and_measure(run(ade, tmp_path / "segment"), segment)[0].main.value > 40


def test_the_command_takes_its_defaults_from_the_recipe(
    ade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"--recipe miniature --backbone random:test_resnet --data {ade} --device cpu --threads 1"
    more = f"--out {tmp_path / 'out'} --iterations 3 --crop 64 --batch-size 2 --stop-after 1"
    monkeypatch.setattr("sys.argv", ["ubgen-eval", "segment", *options.split(), *more.split()])
    main()
    (trained,) = (tmp_path / "out/training").iterdir()
    settings = json.loads((trained / "run.json").read_text())["identity"]["settings"]
    recipe = load_recipe("miniature", DenseRecipe, "dense").segment
    given = {name: settings[name] for name in ("iterations", "crop", "batch_size")}
    assert given == {"iterations": 3, "crop": 64, "batch_size": 2}
    assert settings["channels"] == recipe.channels != SegmentSettings().channels
    assert settings["long_side"] == recipe.long_side != SegmentSettings().long_side
