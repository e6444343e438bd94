"""What the adversary of Eq. 5 asks the generator for, on the miniature: how much of its gradient is about backgrounds.

    .venv/bin/python bench/adversary.py

Discriminators are trained on images of the base generator, which stays as it is. Then the gradient of the generator's
loss with respect to the images' unit CLIP features is compared with the direction in which the background that goes
with a class sets its images apart (found with the fair world's images). Writes bench/results/adversary.{json,md}.
"""

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.core.classes import load_classes
from ubgen.core.config import load_recipe
from ubgen.miniature.shapes import CLASSES
from ubgen.miniature.world import biased_scene, fair_world, render_many
from ubgen.rewards import Clip, draw_negatives, entire_alignment_loss
from ubgen.train import TrainConfig
from ubgen.train.batches import draw_batch
from ubgen.train.state import build_state, make_adversary
from ubgen.train.update import discriminator_update, warmup_features


@dataclass(frozen=True)
class Kind:
    """A discriminator."""

    features: Literal["raw", "normalised"]
    hidden: int
    lr: float
    weight_decay: float


KINDS = (
    Kind("raw", 3, 1e-4, 30.0),
    Kind("raw", 64, 1e-4, 30.0),
    Kind("normalised", 3, 1e-3, 0.01),
    Kind("normalised", 64, 1e-3, 0.01),
)


@dataclass(frozen=True)
class Arguments:
    """What the adversary's gradient asks for."""

    out: Path = Path("bench/results")
    """Directory of the figures."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 42)
    """Seeds of the discriminators."""
    updates: tuple[int, ...] = (10, 120)
    """After how many updates of 16 images to look."""
    batches: int = 40
    """Batches of 32 images of the base generator."""
    steps: int = 25
    """PNDM steps of each."""
    fair: int = 3000
    """Images of the fair world, which show where the biased background lies."""


@dataclass(frozen=True)
class Look:
    """After `updates` updates."""

    kind: Kind
    seed: int
    updates: int
    loss: float
    """The discriminator's; 0.69 is chance."""
    gradient: float
    """Mean length of the gradient on a unit feature."""
    away_from_bias: float
    """Mean cosine of what the gradient asks for and of leaving the background that goes with the class."""


def base_features(config: TrainConfig, batches: int) -> tuple[Tensor, Tensor]:
    """CLIP features of the base generator's images (N, D), and their classes (N,)."""
    classes = load_classes(config.classes)
    state = build_state(config, classes, torch.device("cpu"))
    features, labels = [], []
    for update in track(range(batches), description="base generator"):
        batch = draw_batch(
            config, classes.names, state.sd.latent_shape(), "warmup", update, 32, rank=0, processes=1
        )
        found, _ = warmup_features(state, config, [batch])
        features.append(found)
        labels.append(batch.classes_B)
    return torch.cat(features), torch.cat(labels)


def bias_directions(clip: Clip, names: tuple[str, ...], count: int) -> Tensor:
    """(classes, D), of length 1: a class's mean image on its own background, less that on any, in the fair world."""
    labels = tuple(CLASSES.index(name) for name in names)
    images, factors = render_many(fair_world(classes=labels), count, seed=7)
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(128)
    with torch.no_grad():
        unit = F.normalize(
            torch.cat([clip.encode_image(part.float() / 255).float() for part in parts]), dim=1
        )
    label = torch.tensor([f.label for f in factors])
    scene = torch.tensor([f.scene for f in factors])
    own = [unit[(label == k) & (scene == biased_scene(k))].mean(0) - unit[label == k].mean(0) for k in labels]
    return F.normalize(torch.stack(own), dim=1)


def looks(
    kind: Kind, seed: int, at: tuple[int, ...], images_ND: Tensor, labels_N: Tensor,
    config: TrainConfig, clip: Clip, bias_CD: Tensor,
) -> list[Look]:  # fmt: skip
    """Train one discriminator on the images, 16 at a time, and look at it after each of `at` updates."""
    config = replace(config, seed=seed, discriminator=replace(config.discriminator, **asdict(kind)))
    classes = load_classes(config.classes)
    adversary = make_adversary(config, clip, classes, torch.device("cpu"))
    assert adversary is not None
    draws, found = torch.Generator().manual_seed(seed), []
    for update in range(max(at)):
        rows = torch.arange(update * 16, update * 16 + 16) % len(images_ND)
        negatives = draw_negatives(labels_N[rows], classes.names, draws)
        loss = discriminator_update(adversary, config, images_ND[rows], negatives)["discriminator_loss"]
        if update + 1 in at:
            images = images_ND.clone().requires_grad_(True)
            entire = entire_alignment_loss(adversary.network, images) * len(images)
            (gradient,) = torch.autograd.grad(entire, images)
            gradient = gradient * images_ND.norm(dim=1, keepdim=True)  # on the unit feature
            cosine = F.cosine_similarity(gradient, bias_CD[labels_N], dim=1)  # the generator goes against it
            length = gradient.norm(dim=1).mean().item()
            found.append(Look(kind, seed, update + 1, loss, length, cosine.mean().item()))
    return found


def report(found: list[Look], given: Arguments) -> str:
    columns = (
        "features",
        "hidden",
        "updates",
        "loss (chance: 0.69)",
        "length of the gradient",
        "away from bias",
    )
    table = Table("What the adversary asks the generator for", columns, text_columns=1)
    for kind in KINDS:
        for updates in given.updates:
            rows = [look for look in found if look.kind == kind and look.updates == updates]
            cells = (spread([row.loss for row in rows], ".2f"), spread([row.gradient for row in rows], ".1f"))
            away = spread([row.away_from_bias for row in rows], "+.2f")
            table.rows.append((kind.features, str(kind.hidden), str(updates), *cells, away))
    seeds = ", ".join(map(str, given.seeds))
    table.note = f"""`python bench/adversary.py`: discriminators of seeds {seeds}, trained on {32 * given.batches}
images of the miniature's base generator in {given.steps} PNDM steps. Each cell: smallest, median and largest of the
seeds. "Away from bias": the cosine of what the gradient asks of an image with leaving the background that goes with its
class; 0 is a direction that has nothing to do with it.

{describe(machine_record())}."""
    return table.markdown()


def spread(values: list[float], form: str) -> str:
    """Smallest, median, largest."""
    chosen = (min(values), statistics.median_high(values), max(values))
    return ", ".join(f"{value:{form}}" for value in chosen)


def main() -> None:
    given = tyro.cli(Arguments)
    config = load_recipe("miniature", TrainConfig)
    config = replace(config, rollout=replace(config.rollout, sampler="pndm", steps=given.steps))
    config = replace(config, losses=replace(config.losses, entire=1.0))  # otherwise there is no discriminator
    names = load_classes(config.classes).names
    images, labels = base_features(config, given.batches)
    clip = Clip.load(config.networks.clip)
    bias = bias_directions(clip, names, given.fair)
    found = [
        look
        for kind in KINDS
        for seed in given.seeds
        for look in looks(kind, seed, given.updates, images, labels, config, clip, bias)
    ]
    text = report(found, given)
    (given.out / "adversary.md").write_text(text)
    (given.out / "adversary.json").write_text(json.dumps([asdict(look) for look in found], indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
