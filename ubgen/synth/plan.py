"""What a run will make, fixed at its start."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ubgen.core.classes import ClassList
from ubgen.dataset import Store, finished_shards
from ubgen.synth.config import SynthConfig


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
