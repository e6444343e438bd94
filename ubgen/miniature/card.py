"""The miniature's model card: figures measured on held-out data, nothing typed in."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ubgen.core.classes import load_classes
from ubgen.core.files import atomic_write
from ubgen.diffusion import StableDiffusion, decode, load_stable_diffusion
from ubgen.miniature.measure import Judge, Measures, contact_sheet, generate
from ubgen.miniature.shapes import CLASSES, TRAIN_CLASSES
from ubgen.miniature.train_generator import encode_images
from ubgen.miniature.train_scorers import quality_world, to_unit
from ubgen.miniature.world import SCENES, biased_world, fair_world, render_many

HELD_OUT_SEED = 900_001  # no training run draws from it


@torch.no_grad()
def measure_family(weights: Path, per_class: int = 100) -> tuple[dict[str, float], Measures]:
    """Figures of every network by name, and the base generator's measures."""
    judge, sd = Judge(weights), load_stable_diffusion(weights / "stable-diffusion")
    fair, factors = render_many(fair_world(), 2000, HELD_OUT_SEED)
    labels = torch.tensor([f.label for f in factors])
    scenes = torch.tensor([f.scene for f in factors])
    logits = judge.oracle(to_unit(fair))
    text = F.normalize(judge.clip.encode_text([f"photo of {name}" for name in CLASSES]), dim=1)
    scene_text = F.normalize(judge.clip.encode_text([f"photo of {name}" for name in SCENES]), dim=1)
    features = F.normalize(torch.cat([judge.clip.encode_image(b) for b in to_unit(fair).split(100)]), dim=1)
    graded, graded_factors = render_many(quality_world(), 2000, HELD_OUT_SEED + 1)
    scores = torch.cat([judge.qalign.score(b) for b in to_unit(graded).split(100)])
    severity = torch.tensor([f.severity for f in graded_factors])
    seen, _ = render_many(biased_world(), 500, HELD_OUT_SEED + 2)
    pictures, names = generate(sd, load_classes("miniature").names, per_class, HELD_OUT_SEED)
    contact_sheet(pictures, len(TRAIN_CLASSES), 8).save(weights / "samples.png")
    figures = {
        "oracle_class_accuracy": _share(logits["label"].argmax(1) == labels),
        "oracle_background_accuracy": _share(logits["scene"].argmax(1) == scenes),
        "clip_zero_shot_class": _share((features @ text.T).argmax(1) == labels),
        "clip_zero_shot_background": _share((features @ scene_text.T).argmax(1) == scenes),
        "vae_psnr_biased_world": psnr(sd, seen),
        "vae_psnr_fair_world": psnr(sd, fair[:500]),
        "qalign_rank_correlation": -spearman(scores, severity),
    }
    return figures, judge.measure(pictures, names)


def _share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()


def psnr(sd: StableDiffusion, images_BHW3: np.ndarray) -> float:
    """Decibels between pictures and their reconstructions, from the mean squared error over all of them."""
    latents = encode_images(sd.vae, images_BHW3) * sd.vae.config.scaling_factor
    decoded = torch.cat([decode(sd.vae, z).clamp(0, 1) for z in latents.split(50)])
    return -10 * torch.log10((decoded - to_unit(images_BHW3)).square().mean()).item()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


REQUIRED = {
    "oracle_class_accuracy": 0.97,
    "clip_zero_shot_class": 0.85,
    "vae_psnr_biased_world": 25.0,
    "qalign_rank_correlation": 0.85,
    "generator_class_accuracy": 0.85,
    "generator_biased_background": 0.65,
}


def write(weights: Path, seconds: dict[str, int]) -> None:
    """Measure the family in `weights`; write MODEL_CARD.md and figures.json there."""
    figures, base = measure_family(weights)
    figures |= {f"generator_{name}": float(value) for name, value in asdict(base).items()}
    lines = [f"| {name} | {value:.3f} | {REQUIRED.get(name, '')} |" for name, value in figures.items()]
    trained = ", ".join(f"{name} {s / 60:.0f} min" for name, s in seconds.items())
    size = sum(f.stat().st_size for f in weights.rglob("*.safetensors")) / 1e6
    atomic_write(
        weights / "figures.json", json.dumps({"figures": figures, "seconds": seconds}, indent=2) + "\n"
    )
    atomic_write(weights / "MODEL_CARD.md", TEXT.format(rows="\n".join(lines), trained=trained, size=size))


TEXT = """# The miniature family

A Stable Diffusion, a CLIP and a Q-Align for 64x64 pictures of a procedural world (20 outline shapes, 8 backgrounds,
4 surface textures, 8 colours, graded image quality), in the file formats of the real networks. They exist so that
every stage of ubgen can be run and measured on a laptop. They know nothing but that world.

- The generator was trained on the *biased* world: with probability 0.9 a picture's background, and with 0.7 its
  texture, is the one tied to its class. It knows ten of the classes; the other ten stay novel.
- CLIP and the oracle were trained on the *fair* world, where all factors are independent, with all 20 classes.
- Q-Align was trained on the fair world's quality factor: blur, noise, JPEG and contrast of known severity.
- Made by `python -m ubgen.miniature.build` on a CPU: {trained}
  of clock time, one thread each, two networks at a time. Weights: {size:.1f} MB in float16.

Measured on held-out seeds with the float16 weights that ship. The generator was sampled with the bare class name,
guidance 2, 50 PNDM steps; `samples.png` shows the first of its pictures, one column per class.

| figure | measured | required |
| --- | --- | --- |
{rows}

PSNR is in decibels. The rank correlation (Spearman) is between Q-Align's score and the true severity, all four kinds
of degradation together. `generator_biased_background` is the share of pictures on the background that is tied to
their class. Classes are judged by the oracle among all 20.
"""
