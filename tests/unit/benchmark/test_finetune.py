"""The plan of a fine-tuning run: sizes and work of the very networks that the run would load."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ubgen.benchmark.finetune import GRAPH, plan_training
from ubgen.core.config import load_recipe, resolve_path
from ubgen.core.errors import UserError
from ubgen.diffusion import load_stable_diffusion
from ubgen.export.cost import count_flops
from ubgen.rewards import QAlign
from ubgen.train import TrainConfig

CONFIG = dataclasses.replace(load_recipe("miniature", TrainConfig), max_updates=10)


def with_options(table: str, **values: object) -> TrainConfig:
    return dataclasses.replace(CONFIG, **{table: dataclasses.replace(getattr(CONFIG, table), **values)})


def size(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def test_sizes_and_work_are_those_of_the_networks_that_are_loaded() -> None:
    plan = plan_training(with_options("generator", lora_rank=1), classes=10)
    sd = load_stable_diffusion(CONFIG.networks.stable_diffusion)
    qalign = QAlign.load(CONFIG.networks.qalign)
    assert plan.weights["UNet"] == size(sd.unet)
    assert plan.weights["Q-Align"] == size(qalign)
    rows, config = 2 * CONFIG.batch_size, sd.unet.config
    length = sd.text_encoder.config.max_position_embeddings
    inputs = {
        "sample": torch.empty(rows, *sd.latent_shape()),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.empty(rows, length, config.cross_attention_dim),
    }
    call, steps = count_flops(sd.unet, inputs)[""], CONFIG.rollout.steps - CONFIG.rollout.grad_steps
    counted = plan.flops["sampling without gradient"] / (10 * steps)
    assert call < counted < 1.1 * call, "with the LoRA, which is not in the bare network"
    backward = plan.flops["sampling with gradient"] / (10 * CONFIG.rollout.grad_steps)
    assert 1.9 * counted < backward < 2.5 * counted, "back through frozen weights costs as much as forward"


def test_memory_follows_the_options() -> None:
    base = plan_training(CONFIG, classes=10)
    frugal = plan_training(with_options("rollout", gradient_checkpointing=True), classes=10)
    assert frugal.working[GRAPH] < base.working[GRAPH] / 2
    fewer = plan_training(with_options("rollout", grad_steps=2), classes=10)
    assert fewer.working[GRAPH] == base.working[GRAPH] / 2
    half = plan_training(dataclasses.replace(CONFIG, precision="bf16"), classes=10)
    assert half.weights["UNet"] == pytest.approx(base.weights["UNet"] / 2, rel=0.01)
    offloaded = plan_training(with_options("networks", qalign_offload=True), classes=10)
    assert offloaded.weights["Q-Align"] < base.weights["Q-Align"]
    assert base.peak(offload=True) == offloaded.peak(offload=True) == offloaded.peak(offload=False)


@pytest.mark.slow
def test_the_command_reads_configs_alone(tmp_path: Path) -> None:
    options = []
    for name in ("stable_diffusion", "clip", "qalign"):
        copy = shutil.copytree(resolve_path(getattr(CONFIG.networks, name)), tmp_path / name)
        for weights in copy.rglob("*.safetensors"):
            weights.unlink()
        options += [f"--networks.{name.replace('_', '-')}", str(copy)]
    command = [sys.executable, "-m", "ubgen.cli.train", "--dry-run", "--out", str(tmp_path / "run"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "memory of each GPU" in ended.stdout
    assert "RTX 4090" in ended.stdout
    assert ended.stderr == ""
    assert not (tmp_path / "run").exists()
    (tmp_path / "qalign" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="Q-Align config"):
        plan_training(with_options("networks", qalign=str(tmp_path / "qalign")), classes=10)
