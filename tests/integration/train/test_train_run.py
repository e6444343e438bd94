"""Whole runs of the trainer on tiny random networks."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ubgen.core.errors import UserError
from ubgen.core.stage import Stage, read_manifest
from ubgen.diffusion import LORA_FILE, load_lora, load_stable_diffusion, lora_parameters
from ubgen.rewards import Clip, QAlign
from ubgen.train import LossConfig, RolloutConfig, TrainConfig, train

Change = Callable[..., TrainConfig]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_metrics_tell_the_whole_game(finished: Path) -> None:
    rows = metrics(finished)
    assert [(row["step"], row["phase"]) for row in rows] == [
        *((step, "warmup") for step in (1, 2)),
        *((step, "train") for step in (3, 4, 5, 6)),
    ]
    last = rows[-1]
    total = last["loss_entire"] + last["loss_individual"] + 0.1 * last["loss_quality"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    assert last["clip_similarity"] == pytest.approx(1 - last["loss_individual"], rel=1e-5)
    assert last["quality"] == pytest.approx(5 * (1 - last["loss_quality"]), rel=1e-5)
    assert 0 <= last["discriminator_accuracy"] <= 1
    assert last["generator_grad_norm"] > 0
    assert last["discriminator_grad_norm"] > 0
    assert (last["generator_lr"], last["discriminator_lr"]) == (1e-3, 1e-3)
    assert last["images_per_second"] > 0
    assert "loss" not in rows[0]


def test_our_own_terms_have_their_weights(config: TrainConfig, change: Change, tmp_path: Path) -> None:
    """Without the discriminator there is a warm-up all the same: it measures the base generator."""
    weights = {"class_mean": 3.0, "class_spread": 2.0, "trust": 50.0}
    out = tmp_path / "run"
    config = change(config, "discriminator", warmup_updates=3)
    train(change(config, "losses", entire=0.0, class_queue=3, **weights), out)
    warm, rows = metrics(out)[:3], metrics(out)[3:]
    assert 0 < warm[-1]["class_variance_held"] <= 1
    assert "discriminator_loss" not in warm[0]
    assert not (out / "discriminator.safetensors").exists()
    assert rows[0]["base_distance"] < 1e-12, "a new LoRA changes nothing"
    assert rows[-1]["base_distance"] > 1e-10
    assert rows[-1]["loss_class_mean"] != 0
    for row in rows:
        total = row["loss_individual"] + 0.1 * row["loss_quality"] + 50 * row["base_distance"]
        total += 3 * row["loss_class_mean"] + 2 * row["loss_class_spread"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)


def test_tensorboard_has_the_same_numbers(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(finished)[2:]]


def test_the_log_has_measures_of_the_grids_and_what_a_judge_says_of_them(
    config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    """The base generator's grid is in the first line. The judge sees what the picture shows."""
    seen = []

    def judge(images: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        seen.append((images, list(names)))
        return {"brightness": float(images.mean())}

    out = tmp_path / "run"
    train(change(config, "output", grid_every=4), out, judge=judge)
    with_grid = [row for row in metrics(out) if "grid_brightness" in row]
    assert [row["step"] for row in with_grid] == [1, 6]
    assert [row["grid_brightness"] for row in with_grid] == [images.mean() for images, _ in seen]
    assert seen[0][1] == ["cat", "dog", "fish"] * 2
    picture = np.asarray(Image.open(out / "samples" / "000004.png"))
    assert np.array_equal(seen[1][0][4], picture[20:36, 20:36]), "second row, second column"
    clip, qalign = Clip.load(config.networks.clip), QAlign.load(config.networks.qalign)
    images = torch.from_numpy(seen[1][0]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        texts = clip.encode_text([f"photo of {name}" for name in seen[1][1]])
        similarity = torch.cosine_similarity(clip.encode_image(images), texts).mean().item()
        quality = qalign.score(images).mean().item()
    assert with_grid[1]["grid_clip_similarity"] == pytest.approx(similarity, abs=1e-3)
    assert with_grid[1]["grid_quality"] == pytest.approx(quality, abs=1e-2)


def test_sample_grids_are_written_from_update_0_on(finished: Path) -> None:
    grids = sorted((finished / "samples").iterdir())
    assert [grid.name for grid in grids] == ["000000.png", "000002.png", "000004.png"]
    pictures = [Image.open(grid) for grid in grids]
    assert pictures[0].size == (3 * 18 + 2, 2 * 18 + 2)  # 3 classes, 2 rows, 16x16 images, 2 pixels between
    assert pictures[0].tobytes() != pictures[-1].tobytes()


def test_manifest_comes_with_the_inputs_hashes(finished: Path, config: TrainConfig) -> None:
    manifest = read_manifest(finished, "train")
    assert set(manifest["inputs"]) == {"stable_diffusion", "clip", "qalign", "classes"}
    assert all(entry["hash"].startswith("sha256:") for entry in manifest["inputs"].values())
    assert (manifest["updates"], manifest["images_seen"]) == (4, 8)
    assert manifest["config"]["generator"]["lr"] == config.generator.lr


def test_only_files_that_are_read_say_which_run_it_is(
    finished: Path, config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    """A download holds the same weights in several formats. The run is finished with them, too; not with others."""
    download = shutil.copytree(config.networks.stable_diffusion, tmp_path / "sd")
    for unread in (
        "sd.ckpt",
        "sd-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "model_index.json",
    ):
        (download / unread).write_bytes(b"never read")
    before = contents(finished)
    assert train(change(config, "networks", stable_diffusion=str(download)), finished)
    assert contents(finished) == before
    settings = download / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(UserError, match=r"weights\.stable_diffusion was sha256"):
        train(change(config, "networks", stable_diffusion=str(download)), finished)


def test_the_lora_is_trained_and_loads(finished: Path, config: TrainConfig) -> None:
    unet = load_stable_diffusion(config.networks.stable_diffusion).unet
    load_lora(unet, finished)
    ups = [p for name, p in unet.named_parameters() if "lora_B" in name]
    assert len(lora_parameters(unet)) == 64
    assert all(p.abs().max() > 0 for p in ups)  # B starts at 0: every layer has learned
    assert set(load_file(finished / "discriminator.safetensors")) == {
        f"head.cls.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }


def test_last_checkpoints_are_kept_and_complete(finished: Path) -> None:
    kept = sorted((finished / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["000002", "000004", "000006"]
    assert (kept[-1] / LORA_FILE).read_bytes() == (finished / LORA_FILE).read_bytes()


def test_old_checkpoints_go(config: TrainConfig, change: Change, tmp_path: Path) -> None:
    train(change(config, "output", keep_checkpoints=1, grid_every=0), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000006"]
    assert not (tmp_path / "run" / "samples").exists()


def test_the_same_command_on_a_finished_run_says_so_and_another_is_refused(
    finished: Path, config: TrainConfig, capsys: pytest.CaptureFixture
) -> None:
    before = contents(finished)
    assert train(config, finished)
    assert f"{finished}: finished already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a finished run .*\(seed was 42, now 7\).*--overwrite"):
        train(dataclasses.replace(config, seed=7), finished)
    assert contents(finished) == before


def test_overwriting_starts_again(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(dataclasses.replace(config, max_updates=1), out)
    train(dataclasses.replace(config, max_updates=2, seed=7), out, overwrite=True)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    assert read_manifest(out, "train")["updates"] == 2


def test_a_directory_in_use_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with Stage(tmp_path / "run", "train", {}).hold(), pytest.raises(UserError, match="in use"):
        train(config, tmp_path / "run")


def test_epochs_set_the_length(config: TrainConfig, change: Change, tmp_path: Path) -> None:
    short = change(config, "discriminator", warmup_updates=None, warmup_epochs=1.0)
    train(dataclasses.replace(short, max_updates=None, epochs=1.0), tmp_path / "run")
    phases = [row["phase"] for row in metrics(tmp_path / "run")]
    assert phases == ["warmup"] * 2 + ["train"] * 3  # 5 classes, batches of 4 and then of 2


@pytest.mark.parametrize(
    ("losses", "missing", "logged"),
    [
        (LossConfig(0, 1, 0), "loss_entire", {"clip_similarity", "quality"}),
        (LossConfig(1, 0, 0), "", {"clip_similarity", "quality", "loss_entire"}),
        (LossConfig(0, 0, 1), "loss_entire", {"clip_similarity", "quality"}),
        (LossConfig(1, 1, 0.1, gan="saturating"), "", {"loss_entire"}),
    ],
)
def test_losses_switch_off(
    config: TrainConfig, losses: LossConfig, missing: str, logged: set[str], tmp_path: Path
) -> None:
    train(dataclasses.replace(config, losses=losses, max_updates=1), tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert missing not in last
    assert logged <= set(last)
    weights = {"entire": losses.entire, "individual": losses.individual, "quality": losses.quality}
    total = sum(weight * last[f"loss_{name}"] for name, weight in weights.items() if weight)
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    assert (tmp_path / "run" / "discriminator.safetensors").exists() == (losses.entire > 0)


def test_networks_that_no_loss_needs_are_not_loaded(
    config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    without = change(config, "networks", qalign="/nowhere")
    losses = LossConfig(1, 1, 0, log_unused=False)
    assert train(dataclasses.replace(without, losses=losses, max_updates=1), tmp_path / "run")
    assert "quality" not in metrics(tmp_path / "run")[-1]


def test_gradient_checkpointing_changes_no_bit(
    finished: Path, config: TrainConfig, change: Change, tmp_path: Path
):
    train(change(config, "rollout", gradient_checkpointing=True), tmp_path / "run")
    assert (tmp_path / "run" / LORA_FILE).read_bytes() == (finished / LORA_FILE).read_bytes()


def test_other_options_change_the_result(finished: Path, config: TrainConfig, tmp_path: Path) -> None:
    other = RolloutConfig(
        sampler="pndm", steps=4, grad_steps=2, detach_unet_input=True, gradient_checkpointing=False
    )
    train(dataclasses.replace(config, rollout=other), tmp_path / "run")
    assert (tmp_path / "run" / LORA_FILE).read_bytes() != (finished / LORA_FILE).read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_a_float32_lora(
    config: TrainConfig, finished: Path, precision: str, tmp_path: Path
) -> None:
    train(dataclasses.replace(config, precision=precision, max_updates=1), tmp_path / "run")
    lora = load_file(tmp_path / "run" / LORA_FILE)
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in lora.values())
    full, half = (metrics(out)[2]["generator_grad_norm"] for out in (finished, tmp_path / "run"))
    assert half == pytest.approx(
        full, rel=0.1
    )  # gradients reach the LoRA through the half-precision networks


def test_rewards_rise_where_they_are_all_that_counts(
    config: TrainConfig, change: Change, tmp_path: Path
) -> None:
    """The first update and the sixteenth see the same image: one class, and noise of which the seed is fixed."""
    losses = LossConfig(0, 0, 1, log_unused=False)
    longer = change(change(config, "generator", lr=1e-2), "output", grid_every=0, checkpoint_every=100)
    train(dataclasses.replace(longer, losses=losses, max_updates=16, batch_size=4), tmp_path / "run")
    quality = [row["quality"] for row in metrics(tmp_path / "run")]
    assert sum(quality[-5:]) / 5 > sum(quality[:5]) / 5 + 0.1


def test_clip_as_a_transformers_directory(
    config: TrainConfig, change: Change, tmp_path: Path, write_transformers_clip: Callable[..., Path]
) -> None:
    directory = write_transformers_clip(tmp_path / "clip")
    run = dataclasses.replace(change(config, "networks", clip=str(directory)), max_updates=1)
    assert train(run, tmp_path / "run")
    assert read_manifest(tmp_path / "run")["inputs"]["clip"]["path"] == str(directory)
    assert all(-1 <= row["clip_similarity"] <= 1 for row in metrics(tmp_path / "run"))
