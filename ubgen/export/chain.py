"""The finished chain: images that all engines make together, against PyTorch's from the same noise."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ubgen.diffusion import sample_guided
from ubgen.export.inputs import RealInputs
from ubgen.export.spec import ParitySpec
from ubgen.runtime import Network, run_rows

EQUAL_PSNR = 100.0  # dB, given where there is no difference at all


@dataclass(frozen=True)
class Images:
    """pixels (N,H,W,3) uint8; cosine similarity (N,) to "photo of {class}" in CLIP's space; quality (N,) in [1, 5]."""

    pixels: Tensor
    similarity: Tensor
    quality: Tensor

    @staticmethod
    def of(pixels: Tensor, features: Tensor, texts: Tensor, quality: Tensor) -> "Images":
        return Images(pixels.cpu(), (features * texts).sum(dim=-1).cpu(), quality.cpu())


@dataclass(frozen=True)
class ChainRow:
    """How far the images are apart; the differences are the largest of one image, and their mean over all."""

    images: int
    psnr: float
    lowest_psnr: float
    within_one_level: float
    clip_similarity: float
    mean_clip_similarity: float
    quality: float
    mean_quality: float
    misses: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.misses

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "misses": list(self.misses), "passed": self.passed}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ChainRow":
        known = {key: value for key, value in values.items() if key != "passed"}
        return ChainRow(**{**known, "misses": tuple(values["misses"])})


def run_chain(
    engines: Mapping[str, Network], real: RealInputs, tokens: Tensor, settings: ParitySpec
) -> Images:
    """The images of `real.noise`, made and scored by the engines alone. `tokens` (N,T) are CLIP's of the classes."""
    unet = engines["unet"]
    embeddings = run_rows(engines["text_encoder"], {"input_ids": real.input_ids})["embeddings"]
    prompts = {
        "cond": embeddings[:-1],
        "uncond": embeddings[-1:],
        "guidance": torch.tensor([settings.guidance], dtype=torch.float32),
    }

    def noise(latents: Tensor, timestep: Tensor) -> Tensor:
        return run_rows(unet, {"latents": latents, "timestep": timestep, **prompts})["noise"]

    latents = sample_guided(noise, real.scheduler, real.noise.to(unet.device), steps=settings.steps)
    pixels = run_rows(engines["vae_decoder"], {"latents": latents})["pixels"]
    features = run_rows(engines["clip_image"], {"pixels": pixels})["features"]
    texts = run_rows(engines["clip_text"], {"tokens": tokens})["features"]
    return Images.of(pixels, features, texts, run_rows(engines["qalign"], {"pixels": pixels})["score"])


def compare_chains(ours: Images, reference: Images, settings: ParitySpec) -> ChainRow:
    difference = (ours.pixels.double() - reference.pixels.double()).flatten(1)
    similarity = (ours.similarity.double() - reference.similarity.double()).abs()
    quality = (ours.quality.double() - reference.quality.double()).abs()
    row = ChainRow(
        images=len(difference),
        psnr=_psnr(difference),
        lowest_psnr=min(_psnr(image) for image in difference),
        within_one_level=float((difference.abs() <= 1).double().mean()),
        clip_similarity=float(similarity.max()),
        mean_clip_similarity=float(similarity.mean()),
        quality=float(quality.max()),
        mean_quality=float(quality.mean()),
    )
    return ChainRow(**{**asdict(row), "misses": tuple(_misses(row, settings))})


def _psnr(difference: Tensor) -> float:
    error = float(difference.square().mean())
    return min(EQUAL_PSNR, 10 * math.log10(255**2 / error)) if error > 0 else EQUAL_PSNR


def _misses(row: ChainRow, settings: ParitySpec) -> list[str]:
    """Written so that NaN misses."""
    wanted, misses = settings.chain, []
    if not row.psnr >= wanted.psnr:
        misses.append(f"PSNR {row.psnr:.1f} dB is below {wanted.psnr} dB")
    if not row.within_one_level >= wanted.within_one_level:
        misses.append(
            f"{row.within_one_level:.2%} of values within 1 level, less than {wanted.within_one_level:.2%}"
        )
    if not row.clip_similarity <= wanted.clip_similarity:
        misses.append(
            f"CLIP similarity differs by {row.clip_similarity:.1e}, more than {wanted.clip_similarity:.0e}"
        )
    if not row.quality <= wanted.quality:
        misses.append(f"quality differs by {row.quality:.1e}, more than {wanted.quality:.0e}")
    return misses
