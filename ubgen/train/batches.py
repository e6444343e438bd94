"""The batches of a run. Each is a pure function of (seed, position in the run).

No random state is carried from one update to the next, so a continued run has nothing to restore, and images do
not depend on how many processes share the work.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ubgen.diffusion import draw_training_steps, hashed_generator
from ubgen.rewards import draw_negatives
from ubgen.train.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """One process's share of an update, on the CPU."""

    classes_B: Tensor
    negatives_B: Tensor  # class indices of the texts for the discriminator; never the image's own name
    latents: Tensor  # (B, C, h, w)
    step_noise: Tensor  # (steps, B, C, h, w), used by DDPM
    grad_steps: list[int]
    compared_step: int  # one of them, where the base UNet's noise is computed, too


def updates_for(epochs: float, classes: int, global_batch: int) -> int:
    """Updates that cover the class list `epochs` times."""
    return math.ceil(round(epochs * classes / global_batch, 6))


def warmup_updates(config: TrainConfig, classes: int, global_batch: int) -> int:
    """Updates in which the discriminator trains alone, on twice the images; `warmup_until` may make them more."""
    settings = config.discriminator
    if config.losses.entire == 0 and not config.losses.class_level:
        return 0
    if settings.warmup_updates is not None:
        return settings.warmup_updates
    return updates_for(settings.warmup_epochs, classes, 2 * global_batch)


def draw_batch(
    config: TrainConfig,
    names: tuple[str, ...],
    shape: tuple[int, int, int],
    phase: str,
    update: int,
    size: int,
    rank: int,
    processes: int,
) -> Batch:
    """The batch of `size` images for process `rank` at `update` (from 0) of `phase` ("warmup" or "train")."""
    first = (update * processes + rank) * size
    positions = range(first, first + size)
    classes = torch.tensor([class_at(position, len(names), phase, config.seed) for position in positions])
    noise = [_image_noise(config, shape, phase, position) for position in positions]
    start = hashed_generator("start", config.seed, phase, update, rank)
    rollout = config.rollout
    grad_steps = draw_training_steps(rollout.steps, rollout.grad_steps, start, rollout.sampler)
    return Batch(
        classes_B=classes,
        # only the entire alignment loss needs them
        negatives_B=_negatives(config.seed, names, classes, phase, positions)
        if config.losses.entire > 0
        else classes,
        latents=torch.stack([n[0] for n in noise]),
        step_noise=torch.stack([n[1:] for n in noise], dim=1),
        grad_steps=grad_steps,
        compared_step=grad_steps[int(torch.randint(len(grad_steps), (), generator=start))],
    )


def class_at(position: int, classes: int, phase: str, seed: int) -> int:
    """Class of the image at `position` of the run: each pass over the list has its own permutation."""
    generator = hashed_generator("order", seed, phase, position // classes)
    return int(torch.randperm(classes, generator=generator)[position % classes])


def _image_noise(config: TrainConfig, shape: tuple[int, int, int], phase: str, position: int) -> Tensor:
    """(1 + steps, C, h, w): the starting latents, then each step's noise."""
    steps = config.rollout.steps if config.rollout.sampler == "ddpm" else 0
    return torch.randn((1 + steps, *shape), generator=hashed_generator("noise", config.seed, phase, position))


def _negatives(seed: int, names: tuple[str, ...], classes_B: Tensor, phase: str, positions: range) -> Tensor:
    drawn = [
        draw_negatives(classes_B[i : i + 1], names, hashed_generator("negative", seed, phase, position))
        for i, position in enumerate(positions)
    ]
    return torch.cat(drawn)
