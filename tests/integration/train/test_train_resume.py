"""A run that was stopped anywhere ends with the same bits as one that was not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.core.errors import UserError
from ubgen.diffusion import LORA_FILE
from ubgen.train import TrainConfig, train
from ubgen.train.checkpoint import DISCRIMINATOR_FILE

RESULTS = (LORA_FILE, DISCRIMINATOR_FILE)
DONE = ("000002", "000004", "000006")  # the checkpoints of a whole run


def results(out: Path) -> list:
    """Weights as bytes, and all metrics but the speed."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"]
    return [*((out / name).read_bytes() for name in RESULTS), rows]


@pytest.fixture(scope="module")
def uninterrupted(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "train"
    train(config, out)
    return out


def test_stopped_after_every_update(config: TrainConfig, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = [train(config, out, stop_after=1) for _ in range(6)]
    assert finished == [False] * 5 + [True]
    assert results(out) == results(uninterrupted)


def test_the_average_of_the_last_updates_goes_on_too(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """And it is the mean of the LoRAs in the checkpoints, where there is one for each update; 1.44 times as strong."""
    averaged = change(config, "generator", average_last=3, average_strength=1.44)
    averaged = change(averaged, "output", checkpoint_every=1, keep_checkpoints=6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(averaged, whole)
    assert [train(averaged, parts, stop_after=1) for _ in range(6)] == [False] * 5 + [True]
    assert results(parts) == results(whole)
    last = [load_file(whole / "checkpoints" / f"{done:06d}" / LORA_FILE) for done in (4, 5, 6)]
    for name, mean in load_file(whole / LORA_FILE).items():
        # either matrix of a layer has half of the strength; that is one rounding more than the mean's
        expected = 1.2 * sum(lora[name] for lora in last) / 3
        assert torch.allclose(mean, expected, rtol=3e-7, atol=1e-7)
        if ".up." in name:
            assert not torch.equal(mean, last[-1][name])
    assert (whole / "samples" / "average.png").is_file()


def test_the_centre_of_the_images_and_the_rates_go_on_too(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Stopped within the warm-up, in which the centre is found, and after it."""
    centred = change(config, "discriminator", features="centred", warmup_lr=5e-3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(centred, whole)
    assert [train(centred, parts, stop_after=1) for _ in range(6)] == [False] * 5 + [True]
    assert results(parts) == results(whole)
    counts = [load_file(whole / "checkpoints" / done / DISCRIMINATOR_FILE)["centre.count"] for done in DONE]
    assert counts == [8, 8, 8], "2 warm-up updates of 4 images, and none after them"


def test_the_weight_of_the_entire_loss_goes_on_too(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Stopped within the warm-up, in which the base similarity is measured, and after it."""
    paced = change(config, "losses", individual=8.0, entire_rise=(0.0, 0.02))
    paced = dataclasses.replace(change(paced, "generator", lr=1e-2), max_updates=10)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(paced, whole)
    assert [train(paced, parts, stop_after=1) for _ in range(12)] == [False] * 11 + [True]
    assert results(parts) == results(whole)
    assert any(0 < row["weight_entire"] < 1 for row in results(whole)[2][2:])


def test_half_precision_stopped_after_every_update(config: TrainConfig, tmp_path: Path) -> None:
    """The loss scale and its count of good updates go on too."""
    half = dataclasses.replace(config, precision="fp16", max_updates=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(half, whole)
    assert [train(half, parts, stop_after=1) for _ in range(5)] == [False] * 4 + [True]
    assert results(parts) == results(whole)
    assert scaler(parts) == scaler(whole)
    assert scaler(whole)["_growth_tracker"] == 3, "no update was scaled, or each began anew"


def scaler(out: Path) -> dict:
    return torch.load(out / "checkpoints" / "000005" / "state.pt", weights_only=True)["scaler"]


def test_killed_between_checkpoints(
    config: TrainConfig,
    uninterrupted: Path,
    write_recipe: Callable[[TrainConfig, Path], Path],
    tmp_path: Path,
) -> None:
    out, recipe = tmp_path / "run", write_recipe(config, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "ubgen.cli.train", "--recipe", str(recipe), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_lines(process, out / "metrics.jsonl", 3)  # checkpoints come after 2, 4 and 6
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    (out / "checkpoints" / ".writing-left-behind").mkdir()
    assert train(config, out)
    assert results(out) == results(uninterrupted)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == list(DONE)


def wait_for_lines(process: subprocess.Popen, path: Path, lines: int) -> None:
    for _ in range(6000):
        if path.is_file() and path.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.01)
    raise AssertionError("the run made no progress")


def test_killed_while_metrics_and_checkpoint_were_being_written(
    config: TrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(config, out, stop_after=4)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "train", "images_per_second": 1}\n{"step": 6, "pha')
    last = out / "checkpoints" / "000004"
    (last / "state.pt").unlink()  # as if the directory were incomplete: the one before it counts
    assert train(config, out)
    assert results(out) == results(uninterrupted)


def test_another_configuration_does_not_continue(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, stop_after=1)
    with pytest.raises(UserError, match="seed was 42, now 43"):
        train(dataclasses.replace(config, seed=43), out)
    assert train(config, out)


def test_it_goes_on_where_the_same_weights_lie_and_with_other_outputs(
    config: TrainConfig, change: Callable[..., TrainConfig], uninterrupted: Path, tmp_path: Path
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    train(config, out, stop_after=3)
    shutil.copytree(config.networks.clip, moved)
    elsewhere = change(
        change(config, "networks", clip=str(moved)), "output", keep_checkpoints=1, grid_every=0
    )
    weights = moved / "open_clip_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "logit_scale": tensors["logit_scale"] + 1}, weights)
    with pytest.raises(UserError, match=r"weights\.clip was 'sha256:"):
        train(elsewhere, out)
    shutil.copy(Path(config.networks.clip) / weights.name, weights)
    assert train(elsewhere, out)
    assert results(out) == results(uninterrupted)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["000006"]


@pytest.mark.parametrize(
    ("name", "left"), [("state.pt", 200), ("state.pt", 0), (DISCRIMINATOR_FILE, 200), (DISCRIMINATOR_FILE, 0)]
)
def test_a_damaged_checkpoint_is_named(config: TrainConfig, name: str, left: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, stop_after=2)
    file = out / "checkpoints" / "000002" / name
    file.write_bytes(file.read_bytes()[:left] or b"something else")
    with pytest.raises(UserError, match=r"^[^\n]*000002: damaged checkpoint \([^\n]+$"):
        train(config, out)


def test_a_full_gpu_is_no_damage(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(config, tmp_path / "run", stop_after=2)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.optim.Optimizer.load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(config, tmp_path / "run")


def test_who_may_read_the_run_may_read_its_checkpoints(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run", stop_after=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "000002").stat().st_mode == checkpoints.stat().st_mode


def launch(recipe: Path, outs: list[Path], *options: str) -> subprocess.CompletedProcess:
    """A process for each of `outs`."""
    script = recipe.with_name("launched.py")
    script.write_text(
        "import os, sys\nfrom ubgen.cli.train import main\n"
        f"sys.argv += ['--out', {list(map(str, outs))}[int(os.environ['RANK'])]]\nmain()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(len(outs)),
    ]
    return subprocess.run(
        [*command, str(script), "--recipe", str(recipe), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("features", "rise"),
    [pytest.param("raw", None, marks=pytest.mark.slow), ("centred", (0.0, 0.02))],
)
def test_two_processes_end_where_one_does(
    features: str,
    rise: tuple[float, float] | None,
    config: TrainConfig,
    change: Callable[..., TrainConfig],
    write_recipe: Callable[[TrainConfig, Path], Path],
    tmp_path: Path,
) -> None:
    """Images belong to their place in the run, so sharing them changes the rounding only. One of the runs is stopped,
    and first goes on in a directory that only one process sees."""
    every_step = change(config, "rollout", grad_steps=4)
    every_step = change(every_step, "discriminator", features=features)  # a centre is everyone's
    every_step = change(every_step, "losses", individual=8.0, entire_rise=rise)  # and so is similarity
    train(every_step, tmp_path / "one")
    device = "cpu" if torch.cuda.is_available() else "auto"  # which is the CPU, for processes that meet, too
    halves = dataclasses.replace(every_step, batch_size=1, device=device)
    recipe = write_recipe(halves, tmp_path / "recipe.toml")
    out = tmp_path / "two"
    if rise:
        assert launch(recipe, [out, out], "--stop-after", "3").returncode == 0
        apart = launch(recipe, [out, tmp_path / "not shared"])
        assert apart.returncode != 0
        assert f"--out {out}: the processes found checkpoints of different updates ([3, 0])" in apart.stderr
    done = launch(recipe, [out, out])
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    one, two = (load_file(tmp_path / name / LORA_FILE) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    rows = [results(tmp_path / name)[2] for name in ("one", "two")]
    assert [len(them) for them in rows] == [6, 6]
    weights = [[row["weight_entire"] for row in them[2:]] for them in rows]
    assert weights[0] == pytest.approx(weights[1], abs=1e-4)
    assert weights[0][-1] > 0
