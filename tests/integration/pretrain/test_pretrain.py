"""Whole runs on a small network and real JPEGs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from ubgen.core.config import load_recipe
from ubgen.core.errors import UserError, memory_errors
from ubgen.core.probes import dali
from ubgen.core.stage import read_manifest
from ubgen.pretrain import PretrainConfig, pretrain

WEIGHTS = ("model.safetensors", "model_ema.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WEIGHTS)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(images: Path, validation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end, without a break."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    config = PretrainConfig(
        model="test_resnet", image_size=32, epochs=3, warmup_epochs=1, batch_size=8, micro_batch=4, precision="no",
        evaluate_every=1, checkpoint_every=2, threads=1, device="cpu",
    )  # fmt: skip
    assert pretrain(config, images, out, validation=validation, recipe="a test")
    return out


def test_a_run_leaves_what_the_next_stage_and_people_need(finished: Path, images: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        *WEIGHTS, "run.json", "manifest.json", "metrics.jsonl", "tensorboard", "curve.png", "README.md", "config.json",
    }  # fmt: skip
    manifest = read_manifest(finished, "pretrain")
    assert manifest["updates"] == 9
    assert manifest["images_seen"] == 72
    assert manifest["datasets"]["data"]["path"] == str(images)
    assert json.loads((finished / "config.json").read_text())["class_ids"] == ["blue", "red"]
    assert Image.open(finished / "curve.png").size[0] > 500
    card = (finished / "README.md").read_text()
    assert "26 images of\n2 classes" in card
    assert "top-1" in card
    assert "| augmentation.erasing | 0.25 |" in card
    lines = metrics(finished)
    assert [line["epoch"] for line in lines if line["phase"] == "eval"] == [1, 2, 3]
    assert [line["step"] for line in lines if line["phase"] == "train"] == [3, 6, 9]
    assert all(0 <= line["data_wait"] <= 1 for line in lines if line["phase"] == "train")


def test_the_weights_load_in_timm(finished: Path) -> None:
    options = json.loads((finished / "config.json").read_text())["timm"]
    for name in WEIGHTS:
        model = timm.create_model("test_resnet", **options, checkpoint_path=str(finished / name))
        saved = load_file(finished / name)
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("stops", [(1,), (2, 1, 4)])
def test_a_continued_run_has_the_same_bits(
    finished: Path,
    images: Path,
    validation: Path,
    tmp_path: Path,
    config: PretrainConfig,
    stops: tuple[int, ...],
) -> None:
    for stop in stops:
        config = replace(config, threads=stop)  # their number does not matter
        assert not pretrain(config, images, tmp_path, validation=validation, stop_after=stop)
    assert pretrain(config, images, tmp_path, validation=validation)
    assert same_weights(tmp_path, finished)
    assert [line["step"] for line in metrics(tmp_path) if line["phase"] == "eval"] == [3, 6, 9]


def test_a_finished_run_is_left_as_it_is(
    finished: Path, images: Path, validation: Path, config: PretrainConfig
) -> None:
    before = (finished / "manifest.json").stat().st_mtime_ns
    assert pretrain(config, images, finished, validation=validation)
    assert (finished / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("name", "value"), [("lr", 2e-3), ("batch_size", 4)])
def test_another_run_is_refused(
    finished: Path, images: Path, validation: Path, config: PretrainConfig, name: str, value: float
) -> None:
    with pytest.raises(UserError, match=f"{name} was"):
        pretrain(replace(config, **{name: value}), images, finished, validation=validation)


def test_an_image_that_was_replaced_is_noticed(images: Path, tmp_path: Path, config: PretrainConfig) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    assert not pretrain(config, data, tmp_path / "out", stop_after=1)
    Image.new("RGB", (40, 40)).save(data / "red" / "0.jpg")
    with pytest.raises(UserError, match="data was sha256"):
        pretrain(config, data, tmp_path / "out")


def test_the_card_names_the_licence_of_the_dataset(
    images: Path, finished: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    assert "license: unknown" in (finished / "README.md").read_text().replace('"', "")
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Colours\n")
    assert pretrain(replace(config, epochs=1, warmup_epochs=0), data, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "cc-by-4.0"' in card
    assert "names this licence: cc-by-4.0." in card


def test_another_dataset_is_refused(
    finished: Path, images: Path, validation: Path, config: PretrainConfig
) -> None:
    with pytest.raises(UserError, match="data was sha256"):
        pretrain(config, validation, finished, validation=validation)


def test_other_processes_are_refused(images: Path, tmp_path: Path, config: PretrainConfig) -> None:
    assert not pretrain(config, images, tmp_path, stop_after=1)
    run = tmp_path / "run.json"
    content = json.loads(run.read_text())
    content["identity"]["processes"] = 2
    run.write_text(json.dumps(content))
    with pytest.raises(UserError, match="processes was 2, now 1"):
        pretrain(config, images, tmp_path)


@pytest.mark.parametrize(("precision", "loader"), [("bf16", "threads"), ("fp16", "dali")])
def test_a_vision_transformer_in_half_precision(
    images: Path, tmp_path: Path, config: PretrainConfig, precision: str, loader: str
) -> None:
    if loader == "dali" and not dali().available:
        pytest.skip(dali().detail)
    vit = replace(config, model="test_vit", patch_size=8, epochs=2, precision=precision, loader=loader)
    assert not pretrain(vit, images, tmp_path, stop_after=4)
    assert pretrain(vit, images, tmp_path)
    assert pretrain(vit, images, tmp_path.with_name("whole-" + precision))
    assert same_weights(tmp_path, tmp_path.with_name("whole-" + precision))
    options = json.loads((tmp_path / "config.json").read_text())["timm"]
    assert options == {"num_classes": 2, "img_size": 32, "patch_size": 8}
    timm.create_model("test_vit", **options, checkpoint_path=str(tmp_path / WEIGHTS[0]))
    assert "no validation set" in (tmp_path / "README.md").read_text()


def test_broken_images_stop_the_run_or_are_listed(
    images: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for name in ("red/0.jpg", "blue/3.jpg"):
        (data / name).write_bytes((data / name).read_bytes()[:300])
    short = replace(config, epochs=2)
    with pytest.raises(UserError, match=r"\.jpg: not a usable image"):
        pretrain(short, data, tmp_path / "strict")
    assert pretrain(replace(short, skip_broken=True), data, tmp_path / "lenient")
    listed = (tmp_path / "lenient" / "skipped.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) <= 2
    assert all("red/0.jpg" in line or "blue/3.jpg" in line for line in listed)
    assert f"{len(listed)} images could not be decoded" in (tmp_path / "lenient" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 32}, "26 images, fewer than one batch"),
        ({"batch_size": 7}, "batch_size 7 cannot be cut"),
        ({"model": "resnet5"}, "timm has no 'resnet5'; did you mean"),
        ({"model": "test_vit", "image_size": 30}, "does not fit"),
        ({"num_classes": 3}, "--num-classes 3"),
        ({"warmup_epochs": 3}, "warmup_epochs must be below epochs"),
    ],
)
def test_wrong_options_leave_nothing(
    images: Path, tmp_path: Path, config: PretrainConfig, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(replace(config, **change), images, tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path, config: PretrainConfig) -> None:
    assert not pretrain(config, images, tmp_path, stop_after=1)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"checkpoint\.pt: damaged"):
        pretrain(config, images, tmp_path)


def on_the_host(*_: object) -> None:
    torch.empty(2**58)


def on_a_gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("failure", [on_the_host, on_a_gpu])
@pytest.mark.parametrize(
    "place", ["ubgen.pretrain.state._loss", "ubgen.loading.augment.TrainingTransform.__call__"]
)
def test_out_of_memory_names_the_batch_options(
    images: Path,
    tmp_path: Path,
    config: PretrainConfig,
    failure: Any,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the step, and in the loader, where it is no broken image that could be left out."""
    monkeypatch.setattr(place, failure)
    with pytest.raises(UserError, match=r"out of memory .* lower --micro-batch \(at most 4"):
        pretrain(replace(config, skip_broken=True), images, tmp_path)
    assert not (tmp_path / "skipped.txt").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="another"), memory_errors("wait"):
        raise RuntimeError("another")


def command(config: PretrainConfig, images: Path, out: Path) -> list[str]:
    options = {
        "model": config.model, "image-size": 32, "epochs": 3, "warmup-epochs": 1, "batch-size": 8, "micro-batch": 4,
        "precision": "no", "evaluate-every": 1, "checkpoint-every": 2, "threads": 1, "device": "cpu",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["-m", "ubgen.cli.pretrain", "--data", str(images), "--out", str(out), *flags]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    finished: Path, images: Path, validation: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    line = [sys.executable, *command(config, images, tmp_path), "--val", str(validation)]
    process = subprocess.Popen(line, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.json").exists()
    subprocess.run(line, env=environment, check=True, timeout=120)
    assert same_weights(tmp_path, finished)


@pytest.mark.slow
def test_a_compiled_network_is_trained(
    images: Path, validation: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    """torch.compile on the CPU: continued in its middle, close to the run that is not compiled, loaded by timm."""
    short = replace(config, epochs=2)
    for name, compiled in (("plain", False), ("compiled", True)):
        run = replace(short, compile=compiled)
        assert not pretrain(run, images, tmp_path / name, validation=validation, stop_after=2)
        assert pretrain(run, images, tmp_path / name, validation=validation)
    plain, compiled = (load_file(tmp_path / name / WEIGHTS[0]) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-2)
    timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(tmp_path / "compiled" / WEIGHTS[1]))


@pytest.mark.slow
def test_two_nodes_train_one_network(
    images: Path, validation: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    """Two launchers, as on two machines, that meet at an address; here both are on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    ]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meeting, "--node_rank", str(rank),
             *command(config, images, tmp_path), "--val", str(validation)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    manifest = read_manifest(tmp_path, "pretrain")
    assert manifest["config"]["processes"] == 2
    assert manifest["updates"] == 9


@pytest.mark.slow
def test_two_processes_train_one_network(
    images: Path, validation: Path, tmp_path: Path, config: PretrainConfig
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    line = [*launcher, *command(config, images, tmp_path), "--val", str(validation)]
    subprocess.run([*line, "--stop-after", "4"], env=environment, check=True, timeout=300)
    subprocess.run(line, env=environment, check=True, timeout=300)
    manifest = read_manifest(tmp_path, "pretrain")
    assert manifest["config"]["processes"] == 2
    assert manifest["updates"] == 9
    assert [entry["step"] for entry in metrics(tmp_path) if entry["phase"] == "eval"] == [3, 6, 9]
    timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(tmp_path / WEIGHTS[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit-s"])
def test_the_real_recipe_at_its_real_size(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A few updates on 300 JPEGs: batches of 8 accumulated to 32; stopped, continued, finished, loaded by timm."""
    root, out = tmp_path_factory.mktemp("large") / "data", tmp_path_factory.mktemp("large") / "out"
    rng = np.random.default_rng(0)
    for i in range(300):
        (root / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((512, 512))
        blocks.save(root / f"class{i % 3}" / f"{i}.jpg")
    recipe = load_recipe(name, PretrainConfig, "pretrain")
    short = replace(recipe, epochs=1, warmup_epochs=0, batch_size=32, micro_batch=8)
    assert not pretrain(short, root, out, stop_after=2)
    assert pretrain(short, root, out)
    options = json.loads((out / "config.json").read_text())["timm"]
    assert read_manifest(out, "pretrain")["updates"] == 9
    for weights in WEIGHTS:
        timm.create_model(recipe.model, **options, checkpoint_path=str(out / weights))
