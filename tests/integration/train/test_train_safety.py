"""Half precision that overflows, images scored one by one, accumulated batches, a discriminator that learns nothing."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError, Warned
from ubgen.diffusion import LORA_FILE
from ubgen.train import LossConfig, TrainConfig, train
from ubgen.train.batches import draw_batch
from ubgen.train.state import build_state
from ubgen.train.update import generator_update

Change = Callable[..., TrainConfig]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def short(config: TrainConfig, change: Change) -> TrainConfig:
    """Two warm-up updates and one more, of two steps each, without pictures."""
    quick = change(change(config, "output", grid_every=0), "rollout", steps=2, grad_steps=1)
    return dataclasses.replace(quick, max_updates=1)


def test_an_overflow_repeats_the_update_at_a_lower_scale(
    short: TrainConfig,
    change: Change,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    """The update is the very one that a run makes whose first scale is low enough."""
    steep = change(dataclasses.replace(short, precision="fp16", max_updates=2), "losses", individual=1e3)
    train(steep, tmp_path / "repeated")
    first, second = metrics(tmp_path / "repeated")[2:]
    assert 1 <= first["overflows"] <= 5
    assert first["loss_scale"] == 4096 / 2 ** first["overflows"]
    assert (second["overflows"], second["loss_scale"]) == (0, first["loss_scale"])
    assert "update 3: the gradient overflowed float16; repeated" in capsys.readouterr().err
    monkeypatch.setattr("ubgen.train.state.FIRST_SCALE", first["loss_scale"])
    train(steep, tmp_path / "low")
    assert metrics(tmp_path / "low")[2]["overflows"] == 0
    assert (tmp_path / "low" / LORA_FILE).read_bytes() == (tmp_path / "repeated" / LORA_FILE).read_bytes()


def test_an_overflow_at_every_scale_stops_the_run(short: TrainConfig, change: Change, tmp_path: Path) -> None:
    endless = change(dataclasses.replace(short, precision="fp16"), "losses", individual=1e30)
    with pytest.raises(
        UserError, match=r"update 3: .*at every loss scale down to 128; .*another --precision"
    ):
        train(endless, tmp_path / "run")
    assert [row["phase"] for row in metrics(tmp_path / "run")] == ["warmup", "warmup"]


def test_what_is_only_logged_stops_nothing(short: TrainConfig, change: Change, tmp_path: Path) -> None:
    """A quality score that overflows, and has no weight."""
    broken = shutil.copytree(short.networks.qalign, tmp_path / "qalign")
    tensors = load_file(broken / "model.safetensors")
    head = tensors["lm_head.weight"]
    save_file({**tensors, "lm_head.weight": head.sign() * 3e38}, broken / "model.safetensors")
    other = change(short, "networks", qalign=str(broken))
    with pytest.raises(UserError, match="loss_quality is nan"):
        train(other, tmp_path / "counts")
    assert train(dataclasses.replace(other, losses=LossConfig(1, 1, 0)), tmp_path / "logged")
    assert metrics(tmp_path / "logged")[-1]["quality"] is None


def gradients(config: TrainConfig, seen: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
    """The LoRA's gradient of one update of five images, and what was measured; `seen` gets the decoder's batches."""
    classes = load_classes(config.classes)
    state = build_state(config, classes, torch.device("cpu"))
    state.generator_optimizer.zero_grad = lambda set_to_none: None  # type: ignore[method-assign, misc]
    state.sd.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    batch = draw_batch(config, classes.names, state.sd.latent_shape(), "train", 0, 5, 0, 1)
    _, measured = generator_update(state, config, [batch])
    return torch.cat([p.grad.flatten() for p in state.lora if p.grad is not None]), measured


@pytest.mark.parametrize("size", [1, 2])
def test_images_scored_in_parts_give_the_same_gradient(
    config: TrainConfig, change: Change, size: int
) -> None:
    unclipped = change(config, "generator", clip=1e9)
    whole_seen, parts_seen = list[int](), list[int]()
    whole, measured = gradients(unclipped, whole_seen)
    parts, same = gradients(change(unclipped, "rollout", score_batch=size), parts_seen)
    assert (parts - whole).abs().max() < 1e-6
    assert (parts - whole).norm() < 1e-5 * whole.norm()  # rounding in float32, through the sampler and back
    assert same == pytest.approx(measured, rel=1e-5)
    assert whole_seen == [5]
    expected = {1: [1] * 5, 2: [2, 2, 1]}[size]
    assert parts_seen == [*expected, *reversed(expected)], "forward, then again in the backward pass"


def test_a_discriminator_at_chance_is_warned_of_once(
    short: TrainConfig, change: Change, tmp_path: Path
) -> None:
    slow = change(short, "discriminator", lr=1e-9)
    with pytest.warns(Warned, match=r"after the warm-up the discriminator is right about 50% ") as told:
        train(slow, tmp_path / "slow")
    assert len([w for w in told if issubclass(w.category, Warned)]) == 1
    rows = metrics(tmp_path / "slow")
    assert [row["discriminator_cosine_with_start"] for row in rows] == pytest.approx([1, 1, 1])
    seen = [row["discriminator_accuracy"] for row in rows]
    means = [seen[0], (seen[0] + seen[1]) / 2, (4 * seen[0] + 4 * seen[1] + 2 * seen[2]) / 10]
    assert [row["discriminator_held_back_accuracy"] for row in rows] == pytest.approx(means)


def test_the_warmup_goes_on_until_the_discriminator_is_good(
    short: TrainConfig, change: Change, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    """Also where it was stopped before and after its planned end; and no longer than its limit."""
    patient = change(short, "discriminator", lr=0.1, warmup_until=0.9, warmup_limit=50.0)
    train(patient, tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    warm = [row["discriminator_held_back_accuracy"] for row in rows if row["phase"] == "warmup"]
    assert 2 < len(warm) < 100
    assert max(warm[1:-1]) < 0.9 <= warm[-1]
    assert [row["phase"] for row in rows[len(warm) :]] == ["train"]
    assert rows[-1]["discriminator_cosine_with_start"] < 0.99
    assert not [w for w in recwarn if issubclass(w.category, Warned)]
    for stop in (1, 3, len(warm) - 4):
        train(patient, tmp_path / "parts", stop_after=stop)
    train(patient, tmp_path / "parts")
    assert (tmp_path / "parts" / LORA_FILE).read_bytes() == (tmp_path / "whole" / LORA_FILE).read_bytes()
    hopeless = change(patient, "discriminator", lr=1e-9, warmup_limit=2.0)
    with pytest.warns(Warned, match="after the warm-up"):
        train(hopeless, tmp_path / "limit")
    assert [row["phase"] for row in metrics(tmp_path / "limit")] == [*["warmup"] * 4, "train"]


def test_all_checkpoints_are_kept_for_0(config: TrainConfig, change: Change, tmp_path: Path) -> None:
    every = change(config, "output", keep_checkpoints=0, checkpoint_every=1, grid_every=0)
    train(every, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"{done:06d}" for done in range(1, 7)]


def test_names_that_differ_in_case_are_one_to_every_part(short: TrainConfig, tmp_path: Path) -> None:
    """Too few for the discriminator, which says so; and nobody else's matter."""
    (tmp_path / "cranes.txt").write_text("n1\tCrane\nn2\tcrane\n")
    cranes = dataclasses.replace(short, classes=str(tmp_path / "cranes.txt"))
    with pytest.raises(UserError, match="at least two different class names"):
        train(cranes, tmp_path / "adversary")
    assert train(dataclasses.replace(cranes, losses=LossConfig(0, 1, 0)), tmp_path / "run")
