"""Training on a GPU: follows the CPU's in float32, and runs in half precision with either attention kernel."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ubgen.core import probes
from ubgen.diffusion import LORA_FILE
from ubgen.train import TrainConfig

pytestmark = pytest.mark.gpu
WriteRecipe = Callable[[TrainConfig, Path], Path]


@pytest.fixture
def run(config: TrainConfig, write_recipe: WriteRecipe, tmp_path: Path) -> Callable[..., Path]:
    """A run in a process of its own, as accelerate keeps the device of the first one."""

    def train(name: str, *options: str, **changes: object) -> Path:
        recipe = write_recipe(dataclasses.replace(config, **changes), tmp_path / f"{name}.toml")  # type: ignore[arg-type]
        command = [sys.executable, "-m", "ubgen.cli.train", "--recipe", str(recipe), *options]
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, timeout=600)
        return tmp_path / name

    return train


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_in_float32_it_plays_the_cpus_game(run: Callable[..., Path]) -> None:
    """The first updates; later ones drift apart, as AdamW turns the sign of a tiny gradient into a whole step."""
    cpu, gpu = metrics(run("cpu", device="cpu")), metrics(run("gpu", device="auto", attention="sdpa"))
    first = next(i for i, row in enumerate(cpu) if row["phase"] == "train")
    names = ("loss_entire", "loss_individual", "loss_quality", "quality", "generator_grad_norm")
    for name in names:
        assert gpu[first][name] == pytest.approx(cpu[first][name], rel=5e-3)
    assert gpu[0]["discriminator_loss"] == pytest.approx(cpu[0]["discriminator_loss"], rel=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "xformers"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_the_lora(run: Callable[..., Path], precision: str, attention: str) -> None:
    if attention == "xformers" and not probes.xformers().available:
        pytest.skip(probes.xformers().detail)
    out = run("half", device="auto", precision=precision, attention=attention)
    rows = [row for row in metrics(out) if row["phase"] == "train"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    lora = load_file(out / LORA_FILE)
    moved = [tensor for name, tensor in lora.items() if ".lora.up." in name]
    assert moved
    assert all(tensor.isfinite().all() for tensor in lora.values())
    assert any(tensor.abs().max() > 0 for tensor in moved)  # they begin at zero


def test_a_stopped_run_goes_on(run: Callable[..., Path]) -> None:
    out = run("stopped", "--stop-after", "3", device="auto")
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]
    run("stopped", device="auto")
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]
