"""The measures of `ubgen-dataset stats --out`: figures with intervals, classes, and pictures of what was found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ubgen.dataset.text import plain
from ubgen.report.directories import Stats
from ubgen.report.parts import Part, Picture, Section, Table, Text, number

_PICTURES = {
    "two-meanings.png": "Classes of two meanings: typical images of both clusters",
    "near-duplicates.png": "Near-duplicates",
    "copies.png": "Copies",
    "bad-images.png": "Bad images",
}
_OTHERS = {"histogram", "quantiles"}  # shown with the dataset


def measures(stats: Sequence[Stats]) -> Section:
    columns = {one.name: dict(_figures(_ordered(one.content))) for one in stats}
    names = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in names]
    section = Section("Measures")
    if rows:
        note = "In brackets: the 95 % interval, of figures that have one. Shares are parts of 1."
        section.parts.append(Table("Measures of datasets", ["measure", *columns], rows, note))
    else:
        section.parts.append(Text("stats.json holds no figure."))
    section.sections = [Section(one.name, parts) for one in stats if (parts := list(_parts(one)))]
    return section


def _ordered(content: Mapping[str, Any]) -> dict[str, Any]:
    """What only stats.json has comes before the scores, which the dataset's own section has too."""
    first = [key for key in ("images", "measures", "reference", "inspection") if key in content]
    return {key: content[key] for key in (*first, *(key for key in content if key not in first))}


def _figures(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Any nesting; three numbers are a figure and its interval: "0.31 (0.28 to 0.35)". Other lists are left out."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            if key not in _OTHERS:
                yield from _figures(value, f"{name}, ")
        elif isinstance(value, list):
            if _is_interval(value) and key not in ("class_counts", "class_means", "first"):  # of three
                yield name, _interval(value)
        elif value is not None:
            yield name, plain(number(value))


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) in (int, float) for part in value)


def _interval(value: Sequence[float]) -> str:
    return "{} ({} to {})".format(*(number(float(part)) for part in value))


def _cell(value: Any) -> str:
    return _interval(value) if _is_interval(value) else plain(number(value))


def _parts(stats: Stats) -> Iterable[Part]:
    measured = stats.content.get("measures") or {}
    if meanings := measured.get("two_meanings"):
        yield _meanings(stats.name, meanings)
    if classes := measured.get("classes"):
        yield _classes(stats.name, classes)
    for file, caption in _PICTURES.items():
        if (stats.path / file).is_file():
            yield Picture(stats.path / file, caption, f"Sample images of {stats.name}. {caption}")


def _meanings(where: str, found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [plain(entry["name"]), plain(cluster["near"]), number(cluster["share"]), cluster["prompt_line"]]
        for entry in found
        for cluster in entry["clusters"]
    ]
    columns = ["class", "cluster near", "share", "line for --prompts"]
    return Table(f"Classes of two meanings in {where}", columns, rows)


def _classes(where: str, found: Sequence[Mapping[str, Any]]) -> Table:
    """Whatever figures the classes have."""
    keys = [
        key for key in dict.fromkeys(key for entry in found for key in entry) if key not in ("index", "name")
    ]
    rows = [
        [
            plain(entry.get("name", "")),
            *(_cell(entry.get(key)) for key in keys),
        ]
        for entry in found
    ]
    columns = ["class", *(key.replace("_", " ") for key in keys)]
    return Table(f"Measures of the classes of {where}", columns, rows, folded=True)
