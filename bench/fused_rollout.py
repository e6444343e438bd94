"""What it spares to fuse the LoRA where a rollout needs no gradient: `python -m bench.fused_rollout`.

Two things: the miniature recipe's update with every call unfused and with `FusedTwin`, in turns; and how many operators
that read or write a tensor one call of the UNet at SD1.5's size issues, counted without computing anything: on a GPU
each is at least one kernel to launch. Writes results/fused-rollout.{json,md}.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_suite.sizes import FULL
from ubgen.benchmark import Table, compare, machine_record
from ubgen.benchmark.machine import describe
from ubgen.core.classes import load_classes
from ubgen.core.config import load_recipe
from ubgen.diffusion import FusedTwin, add_lora
from ubgen.train import TrainConfig
from ubgen.train.players import load_players
from ubgen.train.stream import draw_batch
from ubgen.train.update import generator_update

RESULTS = Path(__file__).parent / "results"
ROWS, RANK = 8, 128  # four images with guidance, the paper's rank
NO_KERNEL = ("_unsafe_view", "empty")


class OperatorCount(TorchDispatchMode):
    """Counts the operators that make a tensor of their own; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        self.count += not operator.is_view and not any(name in str(operator) for name in NO_KERNEL)
        return operator(*given, **(options or {}))


def operators() -> Iterator[tuple[str, int]]:
    """Of one call without gradient, in float32."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL.unet)
        latents = torch.empty(ROWS, *FULL.latent)
        context = torch.empty(ROWS, 77, FULL.unet["cross_attention_dim"])
        timestep = torch.empty(ROWS, dtype=torch.int64)
        add_lora(unet, RANK)
    for name, network in (("unfused", unet), ("fused", FusedTwin(unet).network)):
        with torch.no_grad(), OperatorCount() as counter:
            network(latents, timestep, context)
        yield name, counter.count


def main() -> None:
    config = load_recipe("miniature", TrainConfig)
    # the adversary would need a warm-up
    config = replace(config, losses=replace(config.losses, entire=0.0, entire_rise=None))
    classes = load_classes(config.classes)
    players = load_players(config, classes, torch.device("cpu"))
    shape = players.sd.latent_shape()
    batch = draw_batch(config, classes.names, shape, "train", 0, config.batch_size, 0, 1)
    unfused = replace(players, twin=None)
    sides = {
        "unfused": lambda: generator_update(unfused, config, batch),
        "fused": lambda: generator_update(players, config, batch),
    }
    times, record = compare(sides, seconds=60.0), machine_record()
    counts = dict(operators())
    rows = {name: {"ms": times[name].median, "operators": counts[name]} for name in sides}
    table = Table(
        "The calls of a rollout that need no gradient",
        ("LoRA", "update of the miniature, ms", "operators a call"),
    )
    table.text_columns = 1
    table.rows = [(name, f"{row['ms']:.0f}", f"{row['operators']:,}") for name, row in rows.items()]
    slow, fast = rows["unfused"], rows["fused"]
    rollout, generator = config.rollout, config.generator
    table.note = (
        f"Fused against unfused: {fast['ms'] / slow['ms']:.2f} of the time, "
        f"{fast['operators'] / slow['operators']:.2f} of the operators. Update: without the adversary, {rollout.steps} "
        f"{rollout.sampler.upper()} steps, {rollout.grad_steps} of them with gradient, LoRA on the "
        f"{generator.lora_layers}, rank {generator.lora_rank}, medians of {times['fused'].rounds} turns. "
        f"Operators: one call at SD1.5's size, LoRA of rank {RANK}.\n\n{describe(record)}."
    )
    (RESULTS / "fused-rollout.json").write_text(
        json.dumps({"machine": record, "rows": rows}, indent=2) + "\n"
    )
    (RESULTS / "fused-rollout.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main()
