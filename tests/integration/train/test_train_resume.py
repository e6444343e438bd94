"""A run that was stopped anywhere ends with the same bits as one that was not."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.cli.train import main
from ubgen.core.errors import UserError
from ubgen.diffusion import LORA_FILE
from ubgen.train import TrainConfig, train
from ubgen.train.checkpoint import DISCRIMINATOR_FILE

RESULTS = (LORA_FILE, DISCRIMINATOR_FILE)
PRELOADED = [
    "ubgen.cli.train",
    "ubgen.train.loop",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "peft",
    "open_clip",
]
DONE = ("000002", "000004", "000006")  # the checkpoints of a whole run


def results(out: Path) -> list:
    """Weights as bytes, and all metrics but the speed."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"]
    return [*((out / name).read_bytes() for name in RESULTS), rows]


def without_grids(found: list) -> list:
    """What `results` gives, less the measures of grids."""
    *weights, rows = found
    return [*weights, [{k: v for k, v in row.items() if not k.startswith("grid_")} for row in rows]]


def train_in_parts(config: TrainConfig, out: Path, *updates: int) -> None:
    """Stopped after so many updates, and after so many more; then to the end."""
    for count in updates:
        assert not train(config, out, stop_after=count)
    assert train(config, out)


def test_stopped_in_the_warm_up_and_at_its_end_and_after_it(
    config: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    train_in_parts(config, tmp_path / "run", 1, 1, 1)
    assert results(tmp_path / "run") == results(finished)


def test_all_that_is_counted_on_the_way_goes_on_too(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The pool of the base generator's images, in the warm-up; each class's queue, after it; and the LoRA's average."""
    config = change(config, "discriminator", warmup_updates=4)
    config = change(config, "losses", class_mean=3.0, class_spread=2.0, class_queue=3, trust=0.5)
    config = change(config, "generator", lr=1e-2, ema=0.5)
    config = change(config, "output", checkpoint_every=1, keep_checkpoints=20, grid_every=10)
    config = dataclasses.replace(config, max_updates=8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    train_in_parts(config, parts, 1, 4, 4)
    assert results(parts) == results(whole)
    pool = [class_moments(whole, done)["pool"].shape[0] for done in (3, 4, 12)]
    assert pool == [12, 0, 0], "3 warm-up updates of 4 images; fitted after the fourth"
    counts = [int(class_moments(whole, done)["fitted"]["count"].sum()) for done in (4, 12)]
    assert counts == [16, 32]
    rows = results(whole)[2][4:]
    assert any(row["loss_class_mean"] != 0 for row in rows), "every queue was too short"
    assert all(row["base_distance"] > 0 for row in rows[1:])
    expected = saved(whole, 4, LORA_FILE)
    for number, done in enumerate(range(5, 13)):
        decay = min(0.5, (1 + number) / (10 + number))
        lora = saved(whole, done, LORA_FILE)
        expected = {name: decay * expected[name] + (1 - decay) * lora[name] for name in lora}
    for name, mean in load_file(whole / LORA_FILE).items():
        assert torch.allclose(mean, expected[name], rtol=1e-5, atol=1e-7)
        if ".up." in name:
            assert not torch.equal(mean, lora[name])


def class_moments(out: Path, done: int) -> dict:
    state = torch.load(out / "checkpoints" / f"{done:06d}" / "state.pt", weights_only=True)
    return state["class_moments"]


def saved(out: Path, done: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"{done:06d}" / name)


def test_half_precision_goes_on_too(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """With the loss scale, and its count of good updates."""
    half = change(change(config, "rollout", steps=2, grad_steps=1), "output", grid_every=0)
    half = dataclasses.replace(half, precision="fp16", max_updates=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(half, whole)
    train_in_parts(half, parts, 3)
    assert results(parts) == results(whole)
    assert scaler(parts) == scaler(whole)
    assert scaler(whole)["_growth_tracker"] == 3, "no update was scaled, or each began anew"


def scaler(out: Path) -> dict:
    return torch.load(out / "checkpoints" / "000005" / "state.pt", weights_only=True)["scaler"]


def test_killed_between_checkpoints(
    config: TrainConfig,
    finished: Path,
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
    assert results(out) == results(finished)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == list(DONE)


def wait_for_lines(process: subprocess.Popen, path: Path, lines: int) -> None:
    for _ in range(6000):
        if path.is_file() and path.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.01)
    raise AssertionError("the run made no progress")


def test_killed_while_metrics_and_checkpoint_were_being_written(
    config: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(config, out, stop_after=4)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "train", "images_per_second": 1}\n{"step": 6, "pha')
    last = out / "checkpoints" / "000004"
    (last / "state.pt").unlink()  # as if the directory were incomplete: the one before it counts
    assert train(config, out)
    assert results(out) == results(finished)


def test_another_configuration_does_not_continue(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, stop_after=1)
    with pytest.raises(UserError, match=r"an unfinished run .*seed was 42, now 43"):
        train(dataclasses.replace(config, seed=43), out)
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\nfish\ncow\n")
    with pytest.raises(UserError, match=r"class list\[4\] was .*crane.*now .*cow"):
        train(dataclasses.replace(config, classes=str(tmp_path / "classes.txt")), out)
    assert train(config, out)


def test_it_goes_on_where_the_same_weights_lie_and_with_other_outputs(
    config: TrainConfig, change: Callable[..., TrainConfig], finished: Path, tmp_path: Path
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
    with pytest.raises(UserError, match=r"weights\.clip was sha256:"):
        train(elsewhere, out)
    shutil.copy(Path(config.networks.clip) / weights.name, weights)
    assert train(elsewhere, out)
    assert without_grids(results(out)) == without_grids(results(finished))
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


def launch(recipe: Path, outs: list[Path], *options: str) -> tuple[list[int | None], str]:
    """`ubgen-train` in a process for each of `outs`, which meet each other; their exit codes and what they printed.

    The processes are forked from one that has imported all modules, which takes longer than these runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    printed = recipe.with_suffix(".printed")
    command = ["ubgen-train", "--recipe", str(recipe), *options, "--out"]
    processes = []
    for rank, out in enumerate(outs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(outs), "MASTER_PORT": port}
        arguments = ([*command, str(out)], {name: str(value) for name, value in place.items()}, printed)
        processes.append(context.Process(target=_one_of_several, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes], printed.read_text()


def _one_of_several(command: list[str], place: dict[str, str], printed: Path) -> None:
    os.environ |= {**place, "MASTER_ADDR": "localhost"}
    with printed.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = command
    main()


@pytest.fixture
def halves(config: TrainConfig, change: Callable[..., TrainConfig]) -> tuple[TrainConfig, TrainConfig]:
    """The same run for one process and for each of two. The base generator's moments and the queues are everyone's."""
    whole = change(config, "rollout", grad_steps=4)
    whole = change(whole, "losses", individual=8.0, class_mean=3.0, class_spread=2.0, class_queue=3)
    whole = change(whole, "discriminator", warmup_updates=3)
    # with a smaller one AdamW makes whole steps of gradients that are mere rounding
    whole = change(whole, "generator", eps=1e-3)
    whole = change(whole, "output", grid_every=0)
    device = "cpu" if torch.cuda.is_available() else "auto"  # which is the CPU, for processes that meet, too
    return whole, dataclasses.replace(whole, batch_size=1, device=device)


def assert_same_run(one: Path, two: Path) -> None:
    """Images belong to their place in the run, so sharing them changes the rounding only."""
    first, second = (load_file(out / LORA_FILE) for out in (one, two))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    rows = [results(out)[2] for out in (one, two)]
    assert [len(them) for them in rows] == [7, 7]
    for name in ("loss_class_mean", "loss_class_spread"):
        values = [[row[name] for row in them[3:]] for them in rows]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
        assert values[0][-1] != 0


def test_two_processes_end_where_one_does(
    halves: tuple[TrainConfig, TrainConfig],
    write_recipe: Callable[[TrainConfig, Path], Path],
    tmp_path: Path,
) -> None:
    """Stopped, begun again in a directory that only one process sees, continued, and called once more at the end."""
    whole, half = halves
    train(whole, tmp_path / "one")
    out, recipe = tmp_path / "two", write_recipe(half, tmp_path / "recipe.toml")
    assert launch(recipe, [out, out], "--stop-after", "3")[0] == [0, 0]
    codes, printed = launch(recipe, [out, tmp_path / "not shared"])
    assert codes == [2, 2]
    assert f"--out {out}: the processes found checkpoints of different updates ([3, 0])" in printed
    codes, printed = launch(recipe, [out, out])
    assert codes == [0, 0], printed
    assert "2 process(es)" in printed
    assert_same_run(tmp_path / "one", out)
    codes, printed = launch(recipe, [out, out])
    assert codes == [0, 0], printed
    assert printed.count(f"{out}: finished already") == 1


@pytest.mark.slow
def test_two_launched_processes_end_where_one_does(
    halves: tuple[TrainConfig, TrainConfig],
    write_recipe: Callable[[TrainConfig, Path], Path],
    tmp_path: Path,
) -> None:
    """As a user launches them."""
    whole, half = halves
    train(whole, tmp_path / "one")
    recipe = write_recipe(half, tmp_path / "recipe.toml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "ubgen.cli.train", "--recipe", str(recipe), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *command], env=environment, check=True, timeout=300)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_accumulated_batches_are_those_of_as_many_processes(
    config: TrainConfig,
    change: Callable[..., TrainConfig],
    write_recipe: Callable[[TrainConfig, Path], Path],
    tmp_path: Path,
) -> None:
    """With the steps that each process would have drawn for its gradient."""
    one = dataclasses.replace(change(config, "output", grid_every=0), batch_size=1, max_updates=2)
    device = "cpu" if torch.cuda.is_available() else "auto"
    recipe = write_recipe(dataclasses.replace(one, device=device), tmp_path / "recipe.toml")
    codes, printed = launch(recipe, [tmp_path / "two"] * 2)
    assert codes == [0, 0], printed
    train(dataclasses.replace(one, accumulate=2), tmp_path / "accumulated")
    for name in RESULTS:
        first, second = (load_file(tmp_path / out / name) for out in ("two", "accumulated"))
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)
    for row, same in zip(*(results(tmp_path / out)[2] for out in ("two", "accumulated")), strict=True):
        assert same.pop("phase") == row.pop("phase")
        assert same == pytest.approx(row, rel=1e-4, abs=1e-5)
