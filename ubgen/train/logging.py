"""What a run shows people: a few figures, and sample grids."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ubgen.core.files import atomic_write
from ubgen.diffusion import decode, initial_noise, sample, with_sampler
from ubgen.train.config import TrainConfig
from ubgen.train.state import TrainState

SHOWN = {
    "loss": "loss {:.3f}",
    "clip_similarity": "similarity {:.3f}",
    "quality": "quality {:.2f}",
    "discriminator_accuracy": "D right {:.0%}",
    "images_per_second": "{:.2g} images/s",
}


def figures(metrics: dict[str, float]) -> str:
    """The few numbers worth watching."""
    return ", ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


def save_grid(path: Path, state: TrainState, config: TrainConfig) -> None:
    """A PNG of PNDM samples: a column per class, always the same classes and the same starting noise."""
    count, rows = len(state.prompts_NSD), config.output.grid_rows
    columns = min(config.output.grid_classes, count)
    classes = [column * count // columns for column in range(columns)]
    identities = [(cls, row) for row in range(rows) for cls in classes]
    pieces = [
        _sample_images(state, config, identities[i : i + 2 * config.batch_size])
        for i in range(0, len(identities), 2 * config.batch_size)
    ]
    buffer = io.BytesIO()
    _contact_sheet(torch.cat(pieces), columns).save(buffer, format="PNG")
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, buffer.getvalue())


def _contact_sheet(images_B3HW: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images in [0, 1], clamped and put row by row on black."""
    padded = F.pad(images_B3HW.clamp(0, 1), (0, gap, 0, gap)).unflatten(0, (-1, columns))
    sheet = F.pad(padded.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2), (0, 0, gap, 0, gap, 0))
    return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())


@torch.no_grad()
def _sample_images(state: TrainState, config: TrainConfig, identities: list[tuple[int, int]]) -> Tensor:
    """Images B3HW on the CPU; each identity is (class index, image index)."""
    shape = state.sd.latent_shape()
    noise = torch.stack([initial_noise(config.seed, cls, image, shape) for cls, image in identities])
    cond = state.prompts_NSD[[cls for cls, _ in identities]]
    with state.autocast():
        latents = sample(
            state.sd.unet,
            with_sampler(state.sd.scheduler, "pndm"),
            noise.to(state.device),
            cond,
            state.uncond_1SD,
            steps=config.output.grid_steps,
            guidance=config.rollout.guidance,
        )
    return decode(state.sd.vae, latents).cpu()
