"""What a run shows people: a few figures, and sample grids."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ubgen.core.files import atomic_write
from ubgen.diffusion import decode, initial_noise, sample, with_sampler
from ubgen.train.config import TrainConfig
from ubgen.train.state import TrainState

GridJudge = Callable[[np.ndarray, Sequence[str]], dict[str, float]]
"""uint8 images (B, H, W, 3) and the class name of each -> further measures of them."""

SHOWN = {
    "loss": "loss {:.3f}",
    "clip_similarity": "similarity {:.3f}",
    "quality": "quality {:.2f}",
    "discriminator_accuracy": "D right {:.0%}",
    "images_per_second": "{:.2g} images/s",
    "grid_clip_similarity": "in PNDM similarity {:.3f}",
    "grid_quality": "quality {:.2f}",
    "grid_class_accuracy": "accuracy {:.0%}",
    "grid_biased_background": "biased backgrounds {:.0%}",
}


def figures(metrics: dict[str, float]) -> str:
    """The few numbers worth watching."""
    return ", ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


def save_grid(
    path: Path, state: TrainState, config: TrainConfig, names: Sequence[str], judge: GridJudge | None
) -> dict[str, float]:
    """A PNG of PNDM samples: a column per class, always the same classes and the same starting noise. Returns measures.

    They are taken on the sampler of synthesis: a LoRA can raise every figure of the training images, which come from
    another one, and fall apart under PNDM.
    """
    count, rows = len(state.prompts_NSD), config.output.grid_rows
    columns = min(config.output.grid_classes, count)
    classes = [column * count // columns for column in range(columns)]
    identities = [(cls, row) for row in range(rows) for cls in classes]
    pieces = [
        _sample_images(state, config, identities[i : i + 2 * config.batch_size])
        for i in range(0, len(identities), 2 * config.batch_size)
    ]
    images_B3HW = torch.cat(pieces).clamp(0, 1)
    buffer = io.BytesIO()
    _contact_sheet(images_B3HW, columns).save(buffer, format="PNG")
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, buffer.getvalue())
    shown = [cls for cls, _ in identities]
    measures = _measures(state, config, images_B3HW, shown)
    if judge is not None:
        pixels_BHW3 = (images_B3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        measures |= judge(pixels_BHW3, [names[cls] for cls in shown])
    return {f"grid_{name}": value for name, value in measures.items()}


@torch.no_grad()
def _measures(
    state: TrainState, config: TrainConfig, images_B3HW: Tensor, classes: list[int]
) -> dict[str, float]:
    """CLIP similarity and quality, by those of the two networks that are loaded."""
    similarity, quality = list[Tensor](), list[Tensor]()
    size = config.batch_size
    for first in range(0, len(classes), size):
        images = images_B3HW[first : first + size].to(state.device)
        if state.clip is not None and state.descriptions_ND is not None:
            text = state.descriptions_ND[classes[first : first + size]]
            similarity.append(F.cosine_similarity(state.clip.encode_image(images).float(), text))
        if state.qalign is not None:
            quality.append(state.qalign.score(images).float())
    found = {"clip_similarity": similarity, "quality": quality}
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items() if parts}


def _contact_sheet(images_B3HW: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images in [0, 1], put row by row on black."""
    padded = F.pad(images_B3HW, (0, gap, 0, gap)).unflatten(0, (-1, columns))
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
