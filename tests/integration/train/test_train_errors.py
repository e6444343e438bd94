"""A wrong input or a failing machine: one clear line, a non-zero exit, and nothing finished is lost."""

import dataclasses
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.cli.train import parse
from ubgen.core.errors import UserError, run
from ubgen.train import TrainConfig, train

Change = Callable[..., TrainConfig]
Write = Callable[[TrainConfig, Path], Path]


def test_a_warmup_too_short_for_the_class_level_terms(
    config: TrainConfig, change: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """4 images of 5 classes; nothing is written."""
    short = change(change(config, "losses", class_mean=1.0), "discriminator", warmup_updates=1)
    with pytest.raises(UserError, match=r"fewer than two of each; set --discriminator\.warmup-epochs"):
        train(short, tmp_path / "run")
    assert not (tmp_path / "run" / "classes.txt").exists()


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    config: TrainConfig, change: Change, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """A learning rate that throws the weights out of range at the first generator update."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        run(lambda: train(change(config, "generator", lr=1e30), out))
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "update 4: " in error[0]
    assert "is nan" in error[0] or "is inf" in error[0]
    assert str(out / "checkpoints" / "000002") in error[0]
    lora = load_file(out / "checkpoints" / "000002" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in lora.values())
    assert not (out / "manifest.json").exists()


def test_what_overflows_before_anything_was_trained_is_not_the_learning_rates(
    config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    weights = tmp_path / "sd"
    shutil.copytree(config.networks.stable_diffusion, weights)
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "decoder.conv_out.bias": torch.full((3,), 3e38)}, file)
    broken = change(config, "networks", stable_diffusion=str(weights))
    for precision, remedy in (("no", "--overwrite and other weights"), ("bf16", "another --precision")):
        with pytest.raises(UserError, match=rf"update 1: .*{remedy}") as raised:
            train(dataclasses.replace(broken, precision=precision), tmp_path / precision)
        assert "lr" not in str(raised.value)


def test_failing_disk_leaves_the_previous_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    """A limit on the size of files: the next checkpoint cannot be written, as on a full disk."""
    out = tmp_path / "run"
    train(config, out, stop_after=2)
    before = {path.name: path.read_bytes() for path in (out / "checkpoints" / "000002").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            train(config, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["000002"]
    assert before == {path.name: path.read_bytes() for path in (out / "checkpoints" / "000002").iterdir()}
    assert train(config, out)


@pytest.mark.parametrize("name", ["stable_diffusion", "clip", "qalign"])
def test_missing_weights_directory(config: TrainConfig, change: Change, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--networks.{name.replace('_', '-')}: /nowhere is not a directory"):
        train(change(config, "networks", **{name: "/nowhere"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_wrong_input_leaves_the_run_that_it_would_replace(
    config: TrainConfig, change: Change, finished: Path, tmp_path: Path
) -> None:
    """A directory that is not there, weights that only loading them shows to be broken, and senseless options."""
    broken = shutil.copytree(config.networks.qalign, tmp_path / "qalign")
    save_file({}, broken / "model.safetensors", metadata={"format": "pt"})
    one_class = tmp_path / "one.txt"
    one_class.write_text("cat\n")
    before = contents(finished)
    for wrong in (
        change(config, "networks", clip="/nowhere"),
        change(config, "networks", qalign=str(broken)),
        change(config, "generator", lr=-1.0),
        dataclasses.replace(config, classes=str(one_class)),
    ):
        with pytest.raises(UserError):
            train(wrong, finished, overwrite=True)
        assert contents(finished) == before


def test_a_corrected_command_needs_no_other_directory(
    config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    """After a first attempt that failed before, and one that failed after it had begun."""
    out, short = tmp_path / "run", dataclasses.replace(config, max_updates=1)
    with pytest.raises(UserError):
        train(change(short, "networks", clip="/nowhere"), out)
    no_warmup = change(short, "discriminator", warmup_updates=0)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        train(change(no_warmup, "losses", individual=float("1e39")), out)
    assert (out / "run.json").is_file()
    assert train(no_warmup, out)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("stable_diffusion", "unet/diffusion_pytorch_model.safetensors"),
        ("clip", "open_clip_model.safetensors"),
        ("qalign", "model.safetensors"),
    ],
)
def test_missing_tensor(config: TrainConfig, change: Change, name: str, file: str, tmp_path: Path) -> None:
    copy = shutil.copytree(getattr(config.networks, name), tmp_path / name)
    tensors = load_file(copy / file)
    lost = sorted(tensors)[len(tensors) // 2]
    del tensors[lost]
    save_file(tensors, copy / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=lost.replace(".", r"\.")):
        train(change(config, "networks", **{name: str(copy)}), tmp_path / "run")


def test_one_class_name_is_too_few_for_the_discriminator(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("cat\n")
    with pytest.raises(UserError, match="at least two"):
        train(dataclasses.replace(config, classes=str(tmp_path / "one.txt")), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--networks.clip", "/nowhere"], "--networks.clip: /nowhere is not a directory"),
        (["--generator.lr", "-1"], "generator.lr must be positive, not -1.0"),
        (["--recipe", "nothing"], "recipe 'nothing' is neither a .toml file nor one of"),
        (["--classes", "/nowhere.txt"], "/nowhere.txt"),
        (["--stop-after", "0"], "stop_after must be positive, not 0"),
        (["--out", __file__], "cannot write to output directory"),
        (["--out", "memory://bucket/run"], "ubgen-train writes to a local directory only"),
        (["--epochs=1"], "--epochs is replaced by --max-updates of the recipe; add --max-updates None"),
    ],
)
def test_a_wrong_call_of_the_command_is_one_line(options: list[str], line: str, tmp_path: Path) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "ubgen.cli.train", *out, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    (error,) = ended.stderr.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert ended.stdout == ""
    assert not (tmp_path / "run").exists()


def test_help_waits_for_no_heavy_module() -> None:
    program = (
        "import sys; from ubgen.cli.train import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--generator.lr" in ended.stdout
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(ended.stderr.split())


def test_unknown_recipe_key(config: TrainConfig, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    recipe.write_text("batchsize = 3\n" + recipe.read_text())
    with pytest.raises(UserError, match=r"'batchsize'.*'batch_size'"):
        parse(["--recipe", str(recipe)])


def test_command_line_overrides_the_recipe(config: TrainConfig, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    given = parse(["--recipe", str(recipe), "--losses.quality", "0", "--batch-size", "3", "--out", "x"])
    assert (given.config.losses.quality, given.config.batch_size, given.out) == (0.0, 3, Path("x"))
    assert given.config.generator == config.generator


def test_a_length_in_epochs_takes_the_place_of_one_in_updates() -> None:
    lengths = ["--epochs", "1", "--max-updates", "None"]
    given = parse([*lengths, "--discriminator.warmup-epochs", "2", "--discriminator.warmup-updates", "None"])
    assert (given.config.epochs, given.config.max_updates) == (1, None)
    with pytest.raises(UserError, match=r"add --discriminator\.warmup-updates None"):
        parse(["--discriminator.warmup-epochs", "2"])


def test_help_shows_the_recipes_values(
    config: TrainConfig, write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    with pytest.raises(SystemExit) as left:
        parse(["--recipe", str(recipe), "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--generator.lr" in text
    assert "0.001" in text
