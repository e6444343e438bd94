"""A contact sheet: one row of images for each class, so that the user can look at the dataset."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ubgen.dataset import ShardDataset
from ubgen.manifest import atomic_write
from ubgen.synth.plan import Plan

SHEET = "contact-sheet.png"
_ROWS, _COLUMNS = 40, 8
_CELL, _LABEL, _GAP = 96, 150, 4


def write_sheet(dataset: ShardDataset, plan: Plan, path: Path) -> None:
    """The first 8 images of the first 40 classes, each row with its class name, as PNG."""
    rows, columns = min(len(plan.classes), _ROWS), min(plan.per_class, _COLUMNS)
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_LABEL + columns * step, rows * step + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = _GAP + row * step
        _draw_label(draw, plan.classes.names[row], top)
        for column in range(columns):
            image = dataset[column * len(plan.classes) + row].image
            sheet.paste(_fit(image), (_LABEL + column * step, top))
    atomic_write(path, _png(sheet))


def _fit(image: Image.Image) -> Image.Image:
    """Small images are enlarged without smoothing: their pixels are what there is to see."""
    method = Image.Resampling.NEAREST if image.width < _CELL else Image.Resampling.LANCZOS
    return image.resize((_CELL, _CELL), method)


def _draw_label(draw: ImageDraw.ImageDraw, name: str, top: int) -> None:
    font = ImageFont.load_default(size=13)
    label = "".join(character if character.isprintable() else " " for character in name)
    lines = [label[i : i + 20] for i in range(0, min(len(label), 80), 20)]
    for i, line in enumerate(lines):
        draw.text((_GAP, top + _CELL // 2 - 8 * len(lines) + 16 * i), line, fill="black", font=font)


def _png(image: Image.Image) -> bytes:
    from ubgen.dataset import encode_image

    return encode_image(image, "png")
