"""What was run: stages, versions, devices, hashes of what each read, and what the report lacks."""

from collections.abc import Iterable, Mapping
from typing import Any

from ubgen.report.directories import STAGES, Directory, Found
from ubgen.report.parts import Section, Table, Text, flat


def overview(found: Found) -> Section:
    section = Section("What was run")
    section.parts += [*_directories(found), *_commands(found), *_inputs(found), *_versions(found)]
    if missing := _missing(found):
        section.parts.append(Text(f"Not among the given directories: {', '.join(missing)}."))
    if found.others:
        rows = [[name, reason] for name, reason in found.others]
        section.parts.append(Table("Paths that are not shown", ["path", "reason"], rows))
    return section


def settings(directory: Directory) -> Table:
    """Every option of a directory's run."""
    rows = [[name, value] for name, value in flat(directory.manifest.get("config") or {})]
    return Table(f"Settings of {directory.name}", ["option", "value"], rows, folded=True)


def _directories(found: Found) -> Iterable[Table]:
    rows = [
        [
            directory.name,
            f"ubgen-{directory.stage}",
            _text(directory.manifest, "created")[:16].replace("T", " "),
            _text(directory.manifest, "ubgen_version"),
            _text(directory.manifest, "device"),
            directory.hash,
        ]
        for directory in found.finished
    ]
    rows += [[stats.name, "ubgen-dataset stats", "", "", "", ""] for stats in found.stats]
    columns = ["directory", "stage", "finished (UTC)", "ubgen", "device", "hash of its manifest"]
    yield Table("Directories", columns, rows)


def _commands(found: Found) -> Iterable[Table]:
    """The last call of each directory: a run that was continued had others before."""
    rows = [[d.name, str(d.manifest["command"])] for d in found.finished if d.manifest.get("command")]
    if rows:
        yield Table("Commands that finished them", ["directory", "command"], rows)


def _text(values: Mapping[str, Any], name: str) -> str:
    return str(values.get(name, "not stated"))


def _inputs(found: Found) -> Iterable[Table]:
    """A stage names what it read by content; where that is the manifest of a shown directory, its name stands there."""
    known = {directory.hash: directory.name for directory in found.finished}
    rows = []
    for directory in found.finished:
        named = {**_mapping(directory.manifest, "inputs"), **_mapping(directory.manifest, "datasets")}
        for name, entry in named.items():
            if isinstance(entry, Mapping):
                digest = str(entry.get("hash", ""))
                rows.append(
                    [directory.name, str(name), str(entry.get("path", "")), digest, known.get(digest, "")]
                )
    if rows:
        yield Table("Inputs", ["directory", "input", "path", "hash", "shown here as"], rows)


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _versions(found: Found) -> Iterable[Table]:
    versions = {directory.name: _mapping(directory.manifest, "versions") for directory in found.finished}
    names = list(dict.fromkeys(name for of_one in versions.values() for name in of_one))
    rows = [[name, *(str(of_one.get(name, "")) for of_one in versions.values())] for name in names]
    if rows:
        yield Table("Versions of libraries", ["library", *versions], rows, folded=True)


def _missing(found: Found) -> list[str]:
    there = {directory.stage for directory in found.finished}
    missing = [f"{title.lower()} (ubgen-{stage})" for stage, title in STAGES.items() if stage not in there]
    return missing if found.stats else [*missing, "measures (ubgen-dataset stats --out)"]
