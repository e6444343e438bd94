"""The finished chain: images that all engines make together, against PyTorch's from the same noise."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ubgen.export.inputs import RealInputs
from ubgen.export.spec import ParitySpec
from ubgen.runtime.pipeline import Pipeline

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


def run_chain(pipeline: Pipeline, real: RealInputs) -> Images:
    """The images of `real.noise`, made and scored by the engines alone."""
    pixels = pipeline.decode(pipeline.denoise(real.noise, pipeline.encode_prompts(real.names)))
    similarity, quality = pipeline.score(pixels, pipeline.encode_photos(real.names))
    return Images(pixels.cpu(), similarity.cpu(), quality.cpu())


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
