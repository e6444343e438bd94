"""The parity report that an engine directory carries: JSON, a Markdown table, and the pictures of both sides."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ubgen.core.files import atomic_write
from ubgen.export.chain import ChainRow, Images
from ubgen.export.parity import ParityRow

JSON, TABLE, PICTURES = "parity.json", "parity.md", "parity.png"
_TILE = 192  # pixels: larger images are shown smaller
_GAIN = 16  # of the shown difference
_LABEL = 72  # pixels at the left


def write_report(
    out: Path, title: str, rows: Sequence[ParityRow], chain: ChainRow, ours: Images, reference: Images
) -> None:
    """Write the three files into `out`."""
    content = {
        "networks": [row.to_dict() for row in rows],
        "chain": chain.to_dict(),
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
    atomic_write(out / TABLE, markdown(title, rows, chain))
    picture(ours.pixels, reference.pixels).save(out / PICTURES)


def markdown(title: str, rows: Sequence[ParityRow], chain: ChainRow) -> str:
    lines = [
        f"# {title}: engines against PyTorch (float32)",
        "",
        "Error: largest difference over PyTorch's largest value; for pixels, the share beyond one grey level.",
        "",
        *_table(
            ["network", "compiler", "precision", "rows", "max abs", "error", "tolerance", "kept in float32"],
            [
                [
                    row.network,
                    row.compiler,
                    row.precision,
                    str(row.rows),
                    f"{row.max_abs:.2e}",
                    f"{row.error:.2e}",
                    f"{row.tolerance:.0e}",
                    _kept(row),
                ]
                for row in rows
            ],
        ),
        "",
        f"The whole chain, {chain.images} images from the same noise:",
        "",
        *_table(
            ["PSNR", "lowest image", "within 1 level", "CLIP similarity |Δ|, mean", "Q-Align |Δ|, mean"],
            [
                [
                    f"{chain.psnr:.1f} dB",
                    f"{chain.lowest_psnr:.1f} dB",
                    f"{chain.within_one_level:.3%}",
                    f"{chain.clip_similarity:.1e}, {chain.mean_clip_similarity:.1e}",
                    f"{chain.quality:.1e}, {chain.mean_quality:.1e}",
                ]
            ],
        ),
        "",
        f"`{PICTURES}` shows PyTorch's images, the engines', and {_GAIN} times their difference.",
        "",
    ]
    return "\n".join(lines)


def _kept(row: ParityRow) -> str:
    if row.error_without is None:
        return ", ".join(row.kept_float32)
    return f"{', '.join(row.kept_float32)} (error without: {row.error_without:.2e})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


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
