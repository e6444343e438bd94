"""The run's directory: a fresh one, or one to continue."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST, atomic_write
from ubgen.diffusion import LORA_FILE
from ubgen.train.checkpoint import DISCRIMINATOR_FILE, list_checkpoints, remove_unfinished
from ubgen.train.record import METRICS_FILE, TENSORBOARD

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.txt"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
_DIRECTORIES = (CHECKPOINTS, SAMPLES, TENSORBOARD)
_FILES = (CLASSES_FILE, METRICS_FILE, LORA_FILE, DISCRIMINATOR_FILE)
_OURS = {"networks", "classes", "processes"}  # of every record, and together of no other config.json
# where networks and classes lie, while their content counts, and what no update sees: may change on the way
_MAY_CHANGE = {"networks", "classes", "output"}


def check_directory(out: Path, config: Mapping[str, Any], classes: ClassList, overwrite: bool) -> None:
    """UserError unless a run with this configuration may begin, continue, or start again in `out`; changes nothing.

    It names the file of somebody else that the run would replace, or the first option that differs from the run that
    was begun there.
    """
    if (recorded := _recorded(out)) is None:
        for name in (MANIFEST, CONFIG_FILE, *_FILES, *_DIRECTORIES):
            if (out / name).exists():
                raise UserError(
                    f"--out: {out} holds something else than a run ({name}); choose another directory"
                )
    elif not overwrite and not (out / MANIFEST).exists() and _has_checkpoint(out):
        _require_same(out, recorded, config, _lines(classes))


def prepare_directory(out: Path, config: Mapping[str, Any], classes: ClassList, overwrite: bool) -> None:
    """Make `out`, which `check_directory` let pass, ready: a run with a checkpoint is kept unless `overwrite`.

    An attempt that came to no checkpoint left nothing to continue, so that a corrected one takes its place.
    """
    if _has_checkpoint(out) and not overwrite:
        remove_unfinished(out / CHECKPOINTS)
        return
    clear_directory(out)
    atomic_write(out / CONFIG_FILE, json.dumps(config, indent=2) + "\n")  # first: it makes the others ours
    atomic_write(out / CLASSES_FILE, _lines(classes))


def clear_directory(out: Path) -> None:
    """Remove what a run writes, and nothing else; its record stays, to tell whose the rest is if this is cut short."""
    for name in _DIRECTORIES:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first option whose value differs, as "generator.lr was 1e-05, now 2e-05"."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return None if old == new else f"{key} was {old!r}, now {new!r}"
    for name in [*old, *(name for name in new if name not in old)]:
        inner = f"{key}.{name}" if key else str(name)
        if (found := first_difference(old.get(name), new.get(name), inner)) is not None:
            return found
    return None


def _recorded(out: Path) -> dict[str, Any] | None:
    """The configuration of the run that was begun in `out`; None if there is none of ours."""
    try:
        content = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and set(content) >= _OURS else None


def _has_checkpoint(out: Path) -> bool:
    return bool(list_checkpoints(out / CHECKPOINTS))


def _lines(classes: ClassList) -> str:
    return "".join(f"{i}\t{name}\n" for i, name in zip(classes.ids, classes.names, strict=True))


def _require_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], classes_text: str) -> None:
    now = json.loads(json.dumps(new))
    difference = first_difference(
        {**old, **dict.fromkeys(_MAY_CHANGE)}, {**now, **dict.fromkeys(_MAY_CHANGE)}
    )
    if difference is None and (out / CLASSES_FILE).read_text(encoding="utf-8") != classes_text:
        difference = "the class list's content has changed"
    if difference is not None:
        raise UserError(
            f"{out} holds an unfinished run with another configuration ({difference}); "
            "give it the same one to continue, choose another --out, or start again with --overwrite"
        )
