"""Shards put together from images that come in any order."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from ubgen.dataset import ShardWriter, Store
from ubgen.synth.plan import Plan, identity_of
from ubgen.synth.selection import Chosen

Encoded = tuple[Chosen, bytes]


class Assembly:
    """Writes each image to its shard as soon as those before it are there; use it as a context manager.

    An image that is drawn again holds up the rest of its shard, which waits in memory, encoded. `finished` is called
    with the number of every shard that is on disk. Leaving the block with an error removes what is unfinished.
    """

    def __init__(self, store: Store, plan: Plan, seed: int, finished: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._seed = seed
        self._finished = finished
        self._open: dict[int, _OpenShard] = {}

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():  # none is left after a run without error
            shard.writer.__exit__(kind or RuntimeError, error or RuntimeError("unfinished"), trace)

    def add(self, images: list[Encoded]) -> None:
        """Images in any order, each one time."""
        for chosen, data in images:
            number = chosen.item.position // self._plan.shard_size
            if number not in self._open:
                self._open[number] = _OpenShard(self._store, self._plan, number)
            shard = self._open[number]
            shard.waiting[chosen.item.position] = chosen, data
            self._write(shard)
            if shard.next == shard.end:
                del self._open[number]
                shard.writer.__exit__(None, None, None)
                self._finished(number)

    def _write(self, shard: "_OpenShard") -> None:
        while (ready := shard.waiting.pop(shard.next, None)) is not None:
            chosen, data = ready
            for line in chosen.rejected:
                shard.writer.reject(line)
            scores = {"clip_similarity": chosen.made.clip_similarity, "quality": chosen.made.quality}
            label = chosen.item.class_index
            shard.writer.write(shard.next, data, label, self._meta(chosen), scores, chosen.flag)
            shard.next += 1

    def _meta(self, chosen: Chosen) -> dict[str, Any]:
        item, plan = chosen.item, self._plan
        return {
            "class_id": plan.classes.ids[item.class_index],
            "class_name": plan.classes.names[item.class_index],
            "prompt": plan.prompts[item.class_index],
            "identity": identity_of(self._seed, item),
        }


class _OpenShard:
    def __init__(self, store: Store, plan: Plan, number: int) -> None:
        self.next = number * plan.shard_size
        self.end = self.next + plan.shard_length(number)
        self.waiting: dict[int, Encoded] = {}
        self.writer = ShardWriter(store, number, plan.format)
        self.writer.__enter__()
