"""What a run will make: fixed at its start, kept in run.json, compared when it is continued."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubgen.core.classes import ClassList
from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST
from ubgen.dataset import Store, finished_shards, shard_files
from ubgen.synth.accounts import account_files
from ubgen.synth.config import SynthConfig

PLAN = "run.json"
LEDGER = "rejections.jsonl"
_OWN_FILES = (
    *(LEDGER, "classes.json", "README.md", "croissant.json", "samples.csv"),
    *("contact-sheet.png", "scores.png", "throughput.png"),
)
_EXHAUSTED = re.compile(r"exhausted-\d{9,}\.jsonl")


@dataclass(frozen=True)
class Item:
    """One image of the dataset. `position` is its place in the order of generation; `attempt` counts its rejections."""

    position: int
    class_index: int
    image_index: int
    attempt: int = 0


def identity_of(seed: int, item: Item) -> dict[str, int]:
    """All that an image's noise depends on."""
    return {
        "seed": seed,
        "class_index": item.class_index,
        "image_index": item.image_index,
        "attempt": item.attempt,
    }


@dataclass(frozen=True)
class Plan:
    """The order is image 0 of every class, image 1 of every class, ...: every prefix of the dataset is balanced."""

    classes: ClassList
    prompts: tuple[str, ...]
    per_class: int
    shard_size: int
    format: str = "jpg"

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
        return map(self.item, range(first, first + self.shard_length(shard)))

    def shard_length(self, shard: int) -> int:
        return min(self.shard_size, self.images - shard * self.shard_size)

    def unfinished(self, store: Store) -> list[int]:
        """Shards that are not there yet, or not with the number of samples that they should have."""
        there = finished_shards(store)
        return [i for i in range(self.shards) if i not in there or there[i].count != self.shard_length(i)]


def exhausted_file(item: Item) -> str:
    """Ledger of the image that ended a run. Each has its own, as parts of a run may end at the same time."""
    return f"exhausted-{item.position:09d}.jsonl"


def exhausted_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if _EXHAUSTED.fullmatch(name)]


def class_prompts(classes: ClassList, template: str, overrides: Path | None) -> tuple[str, ...]:
    """The prompt of every class, in label order: `template` with {name} replaced, or what `overrides` says.

    `overrides` is a UTF-8 text file of "id<TAB>prompt" lines. UserError for a line that is not of that form, an id that
    is not in the list, and an id that comes twice.
    """
    prompts = {
        c: template.replace("{name}", name) for c, name in zip(classes.ids, classes.names, strict=True)
    }
    seen = set[str]()
    for number, line in enumerate(_lines(overrides) if overrides else [], start=1):
        if not line.strip():
            continue
        class_id, _, prompt = (part.strip() for part in line.partition("\t"))
        where = f"{overrides}, line {number}"
        if not prompt or "\t" in prompt:
            raise UserError(f'{where}: expected "id<TAB>prompt"')
        if class_id not in prompts:
            raise UserError(f"{where}: no class has the id {class_id!r}")
        if class_id in seen:
            raise UserError(f"{where}: the id {class_id!r} came before")
        seen.add(class_id)
        prompts[class_id] = prompt
    return tuple(prompts[c] for c in classes.ids)


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}") from None


def identity(config: SynthConfig, plan: Plan, engine_key: str) -> dict[str, Any]:
    """All that the bytes of the shards depend on, by the name under which a difference is reported."""
    return {
        "engine key": engine_key,
        "class ids": list(plan.classes.ids),
        "class names": list(plan.classes.names),
        "prompts": list(plan.prompts),
        "--per-class": config.per_class,
        "--seed": config.seed,
        "sampler": "pndm",
        "--steps": config.steps,
        "--guidance": config.guidance,
        "--min-similarity": config.min_similarity,
        "--min-quality": config.min_quality,
        "--attempts": config.attempts,
        "--exhausted": config.exhausted,
        "--shard-size": config.shard_size,
        "--format": config.format,
        "encoder": config.resolved_encoder(),
    }


def read_record(store: Store) -> dict[str, Any] | None:
    """The run.json of the run that `store` holds; None for an empty directory, UserError where it holds something else.

    Files whose names begin with a dot do not count.
    """
    others = store.entries()  # before run.json is looked for: parts that begin together write that first
    if store.size(PLAN) is None:
        if others:
            raise UserError(f"{store} holds something else ({others[0]}); choose an empty --out")
        return None
    try:
        record = json.loads(store.read(PLAN))
    except ValueError:
        record = None
    if not isinstance(record, dict) or "engine key" not in record:
        raise UserError(f"{store}: {PLAN} is not that of a ubgen-synth run; choose another --out")
    return record


def start_or_resume(store: Store, this_run: Mapping[str, Any], overwrite: bool, alone: bool = True) -> None:
    """Write run.json, or check that the run in `store` is this one; `overwrite` takes another one away first.

    So does the absence of shards, unless others may be about to write some (not `alone`): of a run that made nothing
    there is nothing to keep. UserError naming what differs from the run that `store` holds.
    """
    that_run = read_record(store)
    if that_run is not None and not overwrite:
        difference = _difference(that_run, this_run)
        if not difference:
            return
        if not alone or shard_files(store.names()):
            raise UserError(
                f"{store} holds a run with another {difference}; use the same, choose another --out, or pass "
                "--overwrite"
            )
    if that_run is not None:
        _clear(store)
    store.write(PLAN, json.dumps(this_run, indent=1) + "\n")


def _clear(store: Store) -> None:
    """All of a run but run.json, which is replaced: whatever happens meanwhile, the directory is seen to be ours.

    The marks of what is whole go first, so that no half dataset looks like a whole one.
    """
    names = set(store.names())
    shards = sorted(shard_files(names), key=lambda name: not name.endswith(".json"))
    for name in [MANIFEST, *shards, *account_files(names), *exhausted_files(names), *_OWN_FILES]:
        if name in names:
            store.delete(name)


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
