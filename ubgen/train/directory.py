"""The run's directory: a fresh one, or one to continue."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubgen.classes import ClassList
from ubgen.diffusion import LORA_FILE
from ubgen.errors import UserError
from ubgen.manifest import atomic_write
from ubgen.train.checkpoint import DISCRIMINATOR_FILE, remove_unfinished
from ubgen.train.record import METRICS_FILE

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.txt"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"


def prepare_directory(out: Path, config: Mapping[str, Any], classes: ClassList, overwrite: bool) -> None:
    """Make `out` ready: cleared if `overwrite`, otherwise empty or a run with this very configuration.

    UserError names the first option that differs from the run that was begun there.
    """
    if overwrite:
        clear_directory(out)
    text = "".join(f"{i}\t{name}\n" for i, name in zip(classes.ids, classes.names, strict=True))
    recorded = out / CONFIG_FILE
    if recorded.is_file():
        _require_same(out, json.loads(recorded.read_text(encoding="utf-8")), config, text)
        remove_unfinished(out / CHECKPOINTS)
    else:
        atomic_write(out / CLASSES_FILE, text)
        atomic_write(recorded, json.dumps(config, indent=2) + "\n")


def clear_directory(out: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in (CHECKPOINTS, SAMPLES, "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (CONFIG_FILE, CLASSES_FILE, METRICS_FILE, LORA_FILE, DISCRIMINATOR_FILE):
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


def _require_same(out: Path, old: Any, new: Mapping[str, Any], classes_text: str) -> None:
    difference = first_difference(old, json.loads(json.dumps(new)))
    if difference is None and (out / CLASSES_FILE).read_text(encoding="utf-8") != classes_text:
        difference = "the class list's content has changed"
    if difference is not None:
        raise UserError(
            f"{out} holds an unfinished run with another configuration ({difference}); "
            "give it the same one to continue, choose another --out, or start again with --overwrite"
        )
