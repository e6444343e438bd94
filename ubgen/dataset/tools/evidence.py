"""Pictures of what the measures found: near-duplicates, copies, bad images, classes with two meanings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from ubgen.core.files import Store
from ubgen.dataset.reader import reading
from ubgen.dataset.text import plain
from ubgen.dataset.tools.measured import Images
from ubgen.dataset.tools.pictures import draw_text, thumbnail, write_png

_CELL, _GAP, _LINE = 96, 4, 18
_ROWS, _COLUMNS = 30, 8


def write_evidence(
    store: Store, images: Images, names: Sequence[str], result: Mapping[str, Any]
) -> list[str]:
    """Names of the PNG files written: two-meanings.png, near-duplicates.png, copies.png and bad-images.png.

    Each only where there is something to see; an older one is deleted then. `result` has what `measure` ("measures")
    and `inspected` ("inspection") gave.
    """
    measures, inspection = result.get("measures") or {}, result.get("inspection") or {}

    def label(place: int) -> str:
        return names[int(images.labels[place])]

    sheets: dict[str, list[tuple[str, list[int]]]] = {
        "two-meanings.png": _meanings(measures.get("two_meanings", ())),
        "near-duplicates.png": _pairs(measures.get("near_duplicates", {}), label),
        "copies.png": _copies(inspection, label),
        "bad-images.png": [
            (f"{kind.replace('_', ' ')}: {found['images']} of {inspection['images']} images", found["first"])
            for kind, found in inspection.get("kinds", {}).items()
            if found["images"]
        ],
    }
    for name, rows in sheets.items():
        if rows:
            write_png(store, name, _sheet(images, rows))
        else:
            store.delete(name)
    return [name for name, rows in sheets.items() if rows]


def _meanings(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int]]]:
    return [
        (
            f"{plain(entry['name'], 60)}: {cluster['share']:.0%} near {plain(cluster['near'], 60)} "
            f"(separation {entry['separation']:.2f})",
            cluster["examples"],
        )
        for entry in found
        for cluster in entry["clusters"]
    ]


def _pairs(found: Mapping[str, Any], label: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    """The nearest pairs of all classes together, four in a row, within classes first."""
    rows, seen = [], set[tuple[int, int]]()
    for part, title in (("within_classes", "within a class"), ("over_all", "over all")):
        pairs = [p for p in found.get(part, {}).get("pairs", ()) if (p[0], p[1]) not in seen]
        seen.update((p[0], p[1]) for p in pairs)
        for start in range(0, min(len(pairs), 20), _COLUMNS // 2):
            some = pairs[start : start + _COLUMNS // 2]
            about = ", ".join(f"{p[2]:.3f} {plain(label(p[0]), 20)}" for p in some)
            rows.append((f"{title}: {about}", [place for p in some for place in p[:2]]))
    return rows


def _copies(found: Mapping[str, Any], label: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    rows, seen = [], set[tuple[int, ...]]()
    for name in ("same_file", "same_pixels", "same_perceptual_hash"):
        for group in found.get(name, {}).get("groups", ()):
            if tuple(group) not in seen:
                seen.add(tuple(group))
                rows.append((f"{name.replace('_', ' ')}: {plain(label(group[0]), 60)}", group))
    return rows


def _sheet(images: Images, rows: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """A line of text over a row of up to eight images, for at most 30 rows."""
    height = _LINE + _CELL + 2 * _GAP
    shown = rows[:_ROWS]
    sheet = Image.new("RGB", (_COLUMNS * (_CELL + _GAP) + _GAP, len(shown) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, places) in enumerate(shown):
        top = _GAP + number * height
        draw_text(draw, (_GAP, top), title, sheet.width - 2 * _GAP, 12)
        for column, place in enumerate(places[:_COLUMNS]):
            with reading(images.describe(place)):
                picture = thumbnail(images.read(place))
            sheet.paste(picture, (_GAP + column * (_CELL + _GAP), top + _LINE))
    return sheet
