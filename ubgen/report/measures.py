"""The measures of `ubgen-dataset stats --out`: each figure with its interval, one column for each stats.json."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ubgen.report.parts import Section, Table, Text, number

_LEFT_TO_OTHERS = {"class_counts", "histogram", "class_means", "quantiles"}


def measures(stats: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    """Any nesting: a value with "low" and "high" beside it becomes "0.31 (0.28 to 0.35)"."""
    columns = {name: dict(_figures(content)) for name, content in stats}
    names = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in names]
    if not rows:
        return Section("Measures", [Text("stats.json holds no figure.")])
    note = "In brackets: the interval that stats.json gives, where it gives one."
    return Section("Measures", [Table("Measures of datasets", ["measure", *columns], rows, note)])


def _figures(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if key in _LEFT_TO_OTHERS:
            continue
        if isinstance(value, Mapping):
            if "value" in value:
                yield name, _figure(value)
            else:
                yield from _figures(value, f"{name}, ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, number(value)


def _figure(value: Mapping[str, Any]) -> str:
    if value["value"] is None:
        return "undefined"
    low, high = value.get("low"), value.get("high")
    interval = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
    return f"{number(value['value'])}{interval}"
