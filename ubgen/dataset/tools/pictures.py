"""Pictures for the user to look at: contact sheets, score histograms, throughput over time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ubgen.core.files import Store, open_store
from ubgen.dataset.images import XMP
from ubgen.dataset.reader import ShardDataset, reading
from ubgen.dataset.text import plain, safe_names, score_titles
from ubgen.dataset.tools.charts import score_figure, throughput_figure
from ubgen.dataset.tools.stats import dataset_stats

SHEET = "contact-sheet.png"
SHEETS = "contact-sheets"
DEFAULT_SHEETS = 100
"""Class sheets, if nobody says how many: a thousand would be 64,000 images to read, from object storage too."""
SCORES = "scores.png"
THROUGHPUT = "throughput.png"
_ROWS, _COLUMNS = 40, 8
_PER_CLASS = 64
_CELL, _LABEL, _GAP, _HEADER = 96, 190, 4, 50
_READERS = 8


def write_pictures(
    dataset: ShardDataset,
    out: str | Path | Store,
    throughput: Sequence[tuple[float, int]] | None = None,
    stats: Mapping[str, Any] | None = None,
    sheets: int | None = DEFAULT_SHEETS,
) -> list[str]:
    """Names of the PNG files written to `out`.

    contact-sheet.png: the first 8 images of the first 40 classes. contact-sheets/ID.png: the first 64 images of a
    class; of more than `sheets` classes, only of that many with the lowest mean score, as each sheet says; None: of
    all. scores.png: histograms of the scores, and the classes' means. throughput.png: from `throughput`, pairs of
    seconds since the start and images done by then. `stats` is what `dataset_stats` gave for `dataset`, if the caller
    has it.
    """
    store = open_store(out)
    stats = stats or dataset_stats(dataset)
    chosen, note = _chosen_classes(stats, sheets)
    places = _first_images(dataset, {*chosen, *range(min(len(dataset.classes), _ROWS))})
    with ThreadPoolExecutor(_READERS) as readers:
        write_png(store, SHEET, _overview(dataset, places, readers))
        written = [SHEET, *_write_class_sheets(dataset, store, chosen, places, stats, note, readers)]
    charts = {SCORES: score_figure(stats), THROUGHPUT: throughput_figure(throughput or [])}
    for name, chart in charts.items():
        if chart:
            store.write(name, chart)
            written.append(name)
    return written


def _chosen_classes(stats: Mapping[str, Any], most: int | None) -> tuple[list[int], str]:
    """The classes that get a sheet of their own, and why these if not all do."""
    classes = len(stats["class_counts"])
    scores = [
        name for name in ("quality", *stats["scores"]) if name in stats["scores"] and stats[name]["count"]
    ]
    if most is None or classes <= most:
        return list(range(classes)), ""
    if not scores:
        return list(range(most)), f"one of the first {most} of {classes} classes"
    means = [np.inf if mean is None else mean for mean in stats[scores[0]]["class_means"]]
    lowest = np.argsort(means, kind="stable")[:most]
    title = score_titles(scores[0])[0]
    return lowest.tolist(), f"one of the {most} of {classes} classes with the lowest mean {title}"


def _first_images(dataset: ShardDataset, classes: set[int]) -> dict[int, list[int]]:
    """Up to 64 places in the dataset for each class, the first ones; reads no more sidecars than it must.

    One after the other: readers that come later would each parse the same ones.
    """
    places: dict[int, list[int]] = {label: [] for label in classes}
    missing = set(classes)
    labels = (label for part in dataset.shard_labels() for label in part.tolist())
    for place, label in enumerate(labels):
        if label in missing:
            places[label].append(place)
            if len(places[label]) == _PER_CLASS:
                missing.remove(label)
                if not missing:
                    break
    return places


def _overview(
    dataset: ShardDataset, places: Mapping[int, list[int]], readers: ThreadPoolExecutor
) -> Image.Image:
    rows = min(len(dataset.classes), _ROWS)
    columns = min(max((len(places[row]) for row in range(rows)), default=0), _COLUMNS)
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_LABEL + columns * step, rows * step + _GAP), "white")
    for row in range(rows):
        top = _GAP + row * step
        _draw_lines(sheet, _wrap(dataset.classes[row]["name"], _LABEL - 3 * _GAP), top + _CELL // 2)
        for column, image in enumerate(_thumbnails(dataset, places[row][:_COLUMNS], readers)):
            sheet.paste(image, (_LABEL + column * step, top))
    return sheet


def _write_class_sheets(
    dataset: ShardDataset,
    store: Store,
    chosen: Sequence[int],
    places: Mapping[int, list[int]],
    stats: Mapping[str, Any],
    note: str,
    readers: ThreadPoolExecutor,
) -> Iterator[str]:
    sheets = open_store(store.address(SHEETS))
    if sheets.local_path:
        sheets.local_path.mkdir(exist_ok=True)
        sheets.delete_leftovers()  # of a run that was killed while it wrote pictures
    files = [f"{name}.png" for name in safe_names([entry["id"] for entry in dataset.classes])]
    for old in set(sheets.names()) - {files[label] for label in chosen}:
        if old.endswith(".png"):
            sheets.delete(old)  # of an earlier run with other classes
    for label in chosen:
        sheet = _class_sheet(list(_thumbnails(dataset, places[label], readers)))
        _draw_header(sheet, dataset.classes[label], _about(label, stats, note))
        write_png(sheets, files[label], sheet)
        yield f"{SHEETS}/{files[label]}"


def _class_sheet(images: Sequence[Image.Image]) -> Image.Image:
    rows = -(-len(images) // _COLUMNS)
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_COLUMNS * step + _GAP, _HEADER + rows * step + _GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (_GAP + i % _COLUMNS * step, _HEADER + i // _COLUMNS * step))
    return sheet


def _draw_header(sheet: Image.Image, entry: Mapping[str, Any], about: str) -> None:
    draw = ImageDraw.Draw(sheet)
    width = sheet.width - 2 * _GAP
    name = plain(entry["name"])
    title = name if plain(entry["id"]) == name else f"{name}  ({plain(entry['id'], 40)})"
    draw_text(draw, (_GAP, 4), title, width, 17)
    draw_text(draw, (_GAP, 28), about, width, 12, "#555555")


def draw_text(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, size: int, colour: str = "black"
) -> None:
    """One line, cut to `width` pixels."""
    draw.text(place, _cut(text, width, size), fill=colour, font=_font(size))


def _about(label: int, stats: Mapping[str, Any], note: str) -> str:
    means = [(score_titles(name)[0], stats[name]["class_means"][label]) for name in stats["scores"]]
    figures = [f"mean {title} {mean:.3f}" for title, mean in means if mean is not None]
    return "; ".join(
        [f"class {label}, {stats['class_counts'][label]} images", *figures, *filter(None, [note])]
    )


def _thumbnails(
    dataset: ShardDataset, places: Sequence[int], readers: ThreadPoolExecutor
) -> Iterator[Image.Image]:
    def of_place(place: int) -> Image.Image:
        data, _ = dataset.encoded(place)
        with reading(f"{dataset.store}: image {place}"):
            return thumbnail(data)

    return readers.map(of_place, places)


def thumbnail(data: bytes) -> Image.Image:
    """96 x 96. Small images are enlarged without smoothing: their pixels are what there is to see."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (_CELL, _CELL))  # JPEG only: decodes no more than is shown
    method = Image.Resampling.NEAREST if image.width < _CELL else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((_CELL, _CELL), method)


@cache
def _font(size: int) -> Any:
    """matplotlib's own DejaVu Sans, which has far more scripts than Pillow's default font."""
    package = find_spec("matplotlib")  # importing it would take 20 MB
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    # the basic layout cannot fail, whatever the text
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _cut(text: str, width: int, size: int) -> str:
    """`text`, shortened to `width` pixels."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _wrap(text: str, width: int) -> list[str]:
    """At most 4 lines of at most `width` pixels, broken between words where that is possible."""
    lines: list[str] = [""]
    for word in plain(text, 120).split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if _font(13).getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > 4:
        lines = [*lines[:3], " ".join(lines[3:])]
    return [_cut(line, width, 13) for line in lines]


def _draw_lines(sheet: Image.Image, lines: Sequence[str], middle: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((_GAP, middle - 8 * len(lines) + 16 * i), line, fill="black", font=_font(13))


def write_png(store: Store, name: str, image: Image.Image) -> None:
    """Straight to the file: the overview may take 10 MB."""
    mark = PngInfo()
    mark.add_itxt("XML:com.adobe.xmp", XMP)
    with store.new_file(name) as file:
        image.save(file, "PNG", compress_level=3, pnginfo=mark)
