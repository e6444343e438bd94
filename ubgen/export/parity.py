"""How far the engines are from PyTorch in float32 on real inputs: each network, their images, and the report."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ubgen.core.config import to_dict
from ubgen.core.console import markdown_table
from ubgen.core.files import atomic_write
from ubgen.export.exportable import Exportable
from ubgen.export.inputs import RealInputs
from ubgen.export.spec import NetworkSpec, ParitySpec
from ubgen.runtime import Network, run_rows
from ubgen.runtime.pipeline import Pipeline

EQUAL_PSNR = 100.0  # dB, for equal images
JSON, TABLE, PICTURES = "parity.json", "parity.md", "parity.png"
_TILE = 192  # pixels: larger images are shown smaller
_GAIN = 16  # of the shown difference
_LABEL = 72  # pixels at the left
_LEFT_OUT = 8  # of so many images, one may part from PyTorch's at a rounding


class _Row:
    """What the manifest and the report have of a comparison."""

    @property
    def passed(self) -> bool:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {**to_dict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {key: value for key, value in values.items() if key != "passed"}
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        )


@dataclass(frozen=True)
class ParityRow(_Row):
    """How far one network is from PyTorch, the worst over all its inputs.

    `error` is what the tolerance bounds: `max_rel` for floats, for pixels the share beyond one grey level.
    `kept_float32`: modules left in float32, and `error_without` what the error was before the export added to them.
    """

    network: str
    compiler: str
    precision: str
    rows: int
    max_abs: float
    max_rel: float
    within_one_level: float | None
    error: float
    tolerance: float
    kept_float32: tuple[str, ...] = ()
    error_without: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def check_parity(
    name: str, engine: Network, network: Exportable, expected: Sequence[Tensor], spec: NetworkSpec
) -> ParityRow:
    """Run the engine on every real input, as batches of several rows and the first row alone.

    `expected` holds PyTorch's output for each of `network.inputs`.
    """
    parts = []
    for inputs, wanted in zip(network.inputs, expected, strict=True):
        parts.append((run_rows(engine, inputs)[network.output].cpu(), wanted))
        if spec.batch.min == 1:
            first = network.rows(inputs, 0, 1)
            parts.append((run_rows(engine, first)[network.output].cpu(), wanted[:1]))
    ours, reference = (torch.cat(side) for side in zip(*parts, strict=True))
    difference = (ours.double() - reference.double()).abs()
    max_abs = float(difference.max())
    max_rel = max_abs / _largest(reference)
    within = float((difference <= 1).double().mean()) if reference.dtype == torch.uint8 else None
    error = max_rel if within is None else 1 - within
    return ParityRow(
        name, spec.compiler, spec.precision, len(reference), max_abs, max_rel, within, error, spec.tolerance
    )


def row_errors(ours: Tensor, reference: Tensor, largest: float | None = None) -> Tensor:
    """(N,) what the tolerance bounds, for each row; NaN counts as infinite.

    `largest` is the largest |value| of all of PyTorch's output, when `reference` is only a part of it.
    """
    difference = (ours.double() - reference.double()).abs().reshape(len(ours), -1)
    if reference.dtype == torch.uint8:
        return (difference > 1).double().mean(dim=1)
    return difference.nan_to_num(nan=torch.inf).amax(dim=1) / (largest or _largest(reference))


def _largest(reference: Tensor) -> float:
    return max(float(reference.double().abs().max()), 1e-12)


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
class PipelineRow(_Row):
    """How far the images of the whole pipeline are apart.

    The differences are the largest of one image, and their mean over all. `lowered`: the same figures of PyTorch itself
    in the engines' precisions, where those are lower than float32.
    """

    images: int
    psnr: float
    lowest_psnr: float
    within_one_level: float
    clip_similarity: float
    mean_clip_similarity: float
    quality: float
    mean_quality: float
    misses: tuple[str, ...] = ()
    lowered: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return not self.misses

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "lowered" or value}


def pipeline_images(pipeline: Pipeline, real: RealInputs) -> Images:
    """The images of `real.noise`, made and scored by the engines alone."""
    pixels = pipeline.decode(pipeline.denoise(real.noise, pipeline.encode_prompts(real.names)))
    return scored(pipeline, real, pixels)


def scored(pipeline: Pipeline, real: RealInputs, pixels: Tensor) -> Images:
    """Images of the classes of `real`, scored by the engines."""
    similarity, quality, _ = pipeline.score(pixels.to(pipeline.device), pipeline.encode_photos(real.names))
    return Images(pixels.cpu(), similarity.cpu(), quality.cpu())


@dataclass(frozen=True)
class _Errors:
    """(N,) of each image: mean square, share of values beyond one level, |difference| of the two scores."""

    square: Tensor
    beyond: Tensor
    similarity: Tensor
    quality: Tensor

    @staticmethod
    def of(ours: Images, reference: Images) -> "_Errors":
        difference = (ours.pixels.double() - reference.pixels.double()).flatten(1)
        return _Errors(
            difference.square().mean(dim=1),
            (difference.abs() > 1).double().mean(dim=1),
            (ours.similarity.double() - reference.similarity.double()).abs(),
            (ours.quality.double() - reference.quality.double()).abs(),
        )

    def row(self) -> PipelineRow:
        return PipelineRow(
            images=len(self.square),
            psnr=_psnr(self.square.mean()),
            lowest_psnr=min(_psnr(square) for square in self.square),
            within_one_level=1 - float(self.beyond.mean()),
            clip_similarity=float(self.similarity.max()),
            mean_clip_similarity=float(self.similarity.mean()),
            quality=float(self.quality.max()),
            mean_quality=float(self.quality.mean()),
        )


def compare_images(
    ours: Images, reference: Images, settings: ParitySpec, lowered: Images | None = None
) -> PipelineRow:
    """`lowered`: PyTorch's own images in the engines' precisions.

    Sampling may part at a rounding, so that an image or two become others, and the engines' need not be the same ones.
    With `lowered`, each image is held against the spec's bounds, or twice the error that PyTorch's own has where that
    is more: the worst against the worst, and so on, after one in eight of the engines' is left out.
    """
    errors = _Errors.of(ours, reference)
    row = errors.row()
    if lowered is None:
        return replace(row, misses=tuple(_misses(row, settings)))
    own = _Errors.of(lowered, reference)
    misses = tuple(_misses_by_image(errors, own, settings))
    return replace(row, misses=misses, lowered=own.row().to_dict())


def _misses_by_image(ours: _Errors, own: _Errors, settings: ParitySpec) -> Iterator[str]:
    wanted = settings.chain
    bounds = {
        "square": 255**2 / 10 ** (wanted.psnr / 10),
        "beyond": 1 - wanted.within_one_level,
        "similarity": wanted.clip_similarity,
        "quality": wanted.quality,
    }
    shown: dict[str, Callable[[float], str]] = {
        "square": lambda error: f"PSNR {_psnr(error):.1f} dB",
        "beyond": lambda error: f"{1 - error:.2%} of values within 1 level",
        "similarity": lambda error: f"CLIP similarity {error:.1e} apart",
        "quality": lambda error: f"quality {error:.1e} apart",
    }
    left_out = len(ours.square) // _LEFT_OUT
    for name, bound in bounds.items():
        errors, owned = (getattr(side, name).sort(descending=True).values for side in (ours, own))
        if not errors.isfinite().all():
            yield f"{shown[name](math.nan)}"
        limits = (2 * owned).clamp(min=bound)[: len(errors) - left_out]
        for error, limit in zip(errors[left_out:].tolist(), limits.tolist(), strict=True):
            if error > limit:
                yield f"an image has {shown[name](error)}; the limit is {shown[name](limit)}"
                break


def _psnr(square: Tensor | float) -> float:
    error = float(square)
    return min(EQUAL_PSNR, 10 * math.log10(255**2 / error)) if error > 0 else EQUAL_PSNR


def _misses(row: PipelineRow, settings: ParitySpec) -> list[str]:
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


def write_report(
    out: Path, title: str, rows: Sequence[ParityRow], pipeline: PipelineRow, ours: Images, reference: Images
) -> None:
    """Write the three files into `out`."""
    content = {
        "networks": [row.to_dict() for row in rows],
        "chain": pipeline.to_dict(),
        "images": [
            {"clip_similarity": [a, b], "quality": [c, d]}
            for a, b, c, d in zip(
                ours.similarity.tolist(),
                reference.similarity.tolist(),
                ours.quality.tolist(),
                reference.quality.tolist(),
                strict=True,
            )
        ],
    }
    atomic_write(out / JSON, json.dumps(content, indent=2) + "\n")
    atomic_write(out / TABLE, markdown(title, rows, pipeline))
    picture(ours.pixels, reference.pixels).save(out / PICTURES)


def markdown(title: str, rows: Sequence[ParityRow], pipeline: PipelineRow) -> str:
    networks = markdown_table(
        ["network", "compiler", "precision", "kept in float32", "rows", "max abs", "error", "tolerance"],
        [
            [
                row.network,
                row.compiler,
                row.precision,
                _kept(row),
                str(row.rows),
                f"{row.max_abs:.2e}",
                f"{row.error:.2e}",
                f"{row.tolerance:.0e}",
            ]
            for row in rows
        ],
        text_columns=4,
    )
    images = markdown_table(
        ["PSNR", "lowest image", "within 1 level", "CLIP similarity |Δ|, mean", "Q-Align |Δ|, mean"],
        [
            [
                f"{pipeline.psnr:.1f} dB",
                f"{pipeline.lowest_psnr:.1f} dB",
                f"{pipeline.within_one_level:.3%}",
                f"{pipeline.clip_similarity:.1e}, {pipeline.mean_clip_similarity:.1e}",
                f"{pipeline.quality:.1e}, {pipeline.mean_quality:.1e}",
            ]
        ],
        text_columns=0,
    )
    own = (
        ""
        if pipeline.lowered is None
        else f"PyTorch itself in these precisions: {lowered_line(pipeline)}.\n\n"
    )
    return f"""# {title}: engines against PyTorch (float32)

Error: largest difference over PyTorch's largest value; for pixels, the share beyond one grey level.

{networks}

The whole pipeline, {pipeline.images} images from the same noise:

{images}

{own}`{PICTURES}` shows PyTorch's images, the engines', and {_GAIN} times their difference.
"""


def lowered_line(pipeline: PipelineRow) -> str:
    """How far PyTorch in lower precision is from itself in float32."""
    own = pipeline.lowered or {}
    return (
        f"PSNR {own['psnr']:.1f} dB, lowest image {own['lowest_psnr']:.1f} dB, "
        f"{own['within_one_level']:.2%} within 1 level, "
        f"CLIP similarity |Δ| {own['clip_similarity']:.1e}, quality |Δ| {own['quality']:.1e}"
    )


def _kept(row: ParityRow) -> str:
    without = "" if row.error_without is None else f" (error without: {row.error_without:.2e})"
    return f"{', '.join(row.kept_float32)}{without}"


def picture(ours_NHW3: Tensor, reference_NHW3: Tensor) -> Image.Image:
    """Three rows of all images: PyTorch, the engines, and their difference made visible."""
    difference = (ours_NHW3.int() - reference_NHW3.int()).abs().mul(_GAIN).clamp(max=255).to(torch.uint8)
    bands = [("PyTorch", reference_NHW3), ("engines", ours_NHW3), (f"{_GAIN} x |diff|", difference)]
    side = min(_TILE, ours_NHW3.shape[1])
    sheet = Image.new("RGB", (_LABEL + len(ours_NHW3) * (side + 2), len(bands) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (label, images) in enumerate(bands):
        draw.text((4, top * (side + 2) + side // 2 - 5), label, fill="black")
        for left, pixels in enumerate(images):
            tile: Any = np.ascontiguousarray(pixels.numpy())
            place = (_LABEL + left * (side + 2), top * (side + 2))
            sheet.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.BOX), place)
    return sheet
