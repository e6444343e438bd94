"""Which of the given paths a report can tell about."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST, RUN, read_manifest

STATS = "stats.json"
STAGES = {
    "train": "Fine-tuning",
    "export": "Export",
    "synth": "Synthesis",
    "pretrain": "Pre-training",
    "eval": "Evaluation",
}


@dataclass(frozen=True)
class Directory:
    """A finished directory of a stage."""

    path: Path
    name: str
    """Its own among all directories of the report."""
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def hash(self) -> str:
        """Of the manifest, by which later stages name this directory as their input."""
        return f"sha256:{hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()}"


@dataclass(frozen=True)
class Stats:
    """A stats.json of `ubgen-dataset stats`, beside which there may be pictures."""

    path: Path
    name: str
    content: dict[str, Any]


@dataclass
class Found:
    """What is at the given paths."""

    finished: list[Directory] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)
    """Paths that give nothing, and why."""

    def of(self, stage: str) -> list[Directory]:
        return [directory for directory in self.finished if directory.stage == stage]


def find(paths: Sequence[Path]) -> Found:
    """Sort the paths into what a report can show. A directory of directories stands for what is in it.

    UserError when a path does not exist, or none of them gives anything.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or directory")
    places = list(dict.fromkeys(place for path in paths for place in _expanded(path)))
    found = Found()
    names = _names(places)
    for place in places:
        _sort_in(found, place, names[place])
    if not found.finished and not found.stats:
        reasons = f" ({found.others[0][0]}: {found.others[0][1]})" if found.others else ""
        raise UserError(f"there is no finished stage directory among the given paths{reasons}")
    order = list(STAGES)
    found.finished.sort(key=lambda d: order.index(d.stage) if d.stage in STAGES else len(order))
    return found


def _expanded(path: Path) -> Iterable[Path]:
    if path.is_dir() and not _is_marked(path):
        inner = sorted(child for child in path.iterdir() if child.is_dir() and _is_marked(child))
        return inner or [path]
    return [path]


def _is_marked(path: Path) -> bool:
    return any((path / name).is_file() for name in (RUN, MANIFEST, STATS))


def _names(places: Sequence[Path]) -> dict[Path, str]:
    """As many of the last parts of each path as it takes to tell it from the others."""
    parts = {place: place.resolve().parts for place in places}
    names = {}
    for place, own in parts.items():
        others = [other for other in parts.values() if other != own]
        count = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
        names[place] = "/".join(own[-count:])
    return names


def _sort_in(found: Found, place: Path, name: str) -> None:
    stats = place / STATS
    if stats.is_file():
        try:
            content = json.loads(stats.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            found.stats.append(Stats(place, name, content))
        else:
            found.others.append((name, f"{STATS} is not valid JSON"))
    if (place / MANIFEST).exists():
        try:
            manifest = read_manifest(place)
        except UserError as error:
            found.others.append((name, str(error)))
            return
        if manifest["stage"] in STAGES:
            found.finished.append(Directory(place, name, manifest))
        else:
            found.others.append(
                (name, f"a directory of {manifest['stage']}, of which a report has nothing to say")
            )
    elif (place / RUN).exists():
        found.others.append((name, f"unfinished (no {MANIFEST})"))
    elif not stats.is_file():
        found.others.append((name, "not a directory of ubgen"))
