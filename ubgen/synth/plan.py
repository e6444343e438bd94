"""What a run will make: fixed at its start, kept in run.json, compared when it is continued."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubgen.classes import ClassList
from ubgen.dataset import finished_shard, shard_files
from ubgen.errors import UserError
from ubgen.manifest import MANIFEST, atomic_write
from ubgen.synth.config import SynthConfig

PLAN = "run.json"
_OWN_FILES = (PLAN, MANIFEST, "classes.json", "README.md", "contact-sheet.png")


@dataclass(frozen=True)
class Item:
    """One image of the dataset. `position` is its place in the order of generation."""

    position: int
    class_index: int
    image_index: int


@dataclass(frozen=True)
class Plan:
    """The order is image 0 of every class, image 1 of every class, ...: every prefix of the dataset is balanced."""

    classes: ClassList
    per_class: int
    shard_size: int

    @property
    def images(self) -> int:
        return len(self.classes) * self.per_class

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def item(self, position: int) -> Item:
        image_index, class_index = divmod(position, len(self.classes))
        return Item(position, class_index, image_index)

    def shard_items(self, shard: int) -> Iterator[Item]:
        first = shard * self.shard_size
        return map(self.item, range(first, min(first + self.shard_size, self.images)))

    def shard_length(self, shard: int) -> int:
        return min(self.shard_size, self.images - shard * self.shard_size)

    def unfinished(self, out: Path) -> list[int]:
        """Shards that are not there yet, or not with the number of samples that they should have."""
        infos = ((shard, finished_shard(out, shard)) for shard in range(self.shards))
        return [shard for shard, info in infos if info is None or info.count != self.shard_length(shard)]


def identity(config: SynthConfig, classes: ClassList, engine_key: str) -> dict[str, Any]:
    """All that the bytes of the shards depend on, by the name under which a difference is reported."""
    return {
        "engine key": engine_key,
        "class ids": list(classes.ids),
        "class names": list(classes.names),
        "prompts": list(classes.names),
        "--per-class": config.per_class,
        "--seed": config.seed,
        "sampler": "pndm",
        "--steps": config.steps,
        "--guidance": config.guidance,
        "--shard-size": config.shard_size,
        "--format": config.format,
    }


def start_or_resume(out: Path, this_run: Mapping[str, Any], overwrite: bool) -> None:
    """Write run.json, or check that the run in `out` is this one; `overwrite` empties `out` of ours first.

    UserError naming what differs from the run that `out` holds.
    """
    path = out / PLAN
    if overwrite:
        _clear(out)
    if not path.exists():
        if stray := next(iter(shard_files(out)), None):
            raise UserError(
                f"{out} holds {stray.name} of an unknown run; choose another --out, or pass --overwrite"
            )
        atomic_write(path, json.dumps(this_run, indent=1) + "\n")
        return
    try:
        that_run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not valid JSON; choose another --out, or pass --overwrite") from None
    if difference := _difference(that_run, this_run):
        raise UserError(
            f"{out} holds a run with another {difference}; use the same, choose another --out, or pass --overwrite"
        )


def _clear(out: Path) -> None:
    for path in [*(out / name for name in _OWN_FILES), *shard_files(out)]:
        path.unlink(missing_ok=True)


def _difference(that: Mapping[str, Any], this: Mapping[str, Any]) -> str | None:
    for name, value in this.items():
        if that.get(name) != value:
            return f"{name} ({_describe(that.get(name), value)})"
    return None


def _describe(that: Any, this: Any) -> str:
    if not isinstance(that, list) or not isinstance(this, list):
        return f"{that!r} there, {this!r} now"
    if len(that) != len(this):
        return f"{len(that)} there, {len(this)} now"
    index = next(i for i, pair in enumerate(zip(that, this, strict=True)) if pair[0] != pair[1])
    return f"class {index} is {that[index]!r} there, {this[index]!r} now"
