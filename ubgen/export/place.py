"""Where an engine may be written: into a directory of its own, and into no other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST, atomic_write

MARK = "export.json"
"""Written first: what is built here. It tells an unfinished engine from a directory of somebody else."""


def require_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """UserError unless `out` is new, empty or an engine's, and apart from all `inputs`; changes nothing.

    An export replaces and removes files, so weights must lie neither in `out` nor around it.
    """
    for name, path in inputs.items():
        if _overlap(out.resolve(), path.resolve()):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"--out: {out} and {option} ({path}) overlap; choose a directory of its own")
    if out.is_dir() and not _is_ours(out) and (strange := _strange(out)):
        raise UserError(f"--out: {out} holds something else ({strange}); choose an empty or new directory")


def mark(out: Path, config: Mapping[str, Any]) -> None:
    """Make the directory `out` an engine's."""
    atomic_write(out / MARK, json.dumps({"stage": "export", **config}, indent=2) + "\n")


def _overlap(out: Path, path: Path) -> bool:
    return path.is_relative_to(out) or out.is_relative_to(path)


def _is_ours(out: Path) -> bool:
    return any(_stage(out / name) == "export" for name in (MARK, MANIFEST))


def _stage(file: Path) -> str | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("stage") if isinstance(content, dict) else None


def _strange(out: Path) -> str | None:
    """The first file's name; hidden ones, such as a lock, do not count: an export leaves those of others alone."""
    return min((path.name for path in out.iterdir() if not path.name.startswith(".")), default=None)
