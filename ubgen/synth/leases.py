"""Which worker makes which shard. A lease ends when the shard is finished or its worker is gone."""

from collections import deque
from collections.abc import Iterable


class Leases:
    """Shards are handed out in order, one at a time; those of a worker that died are handed out again, first."""

    def __init__(self, shards: Iterable[int]) -> None:
        self._free = deque(shards)
        self._held: dict[str, set[int]] = {}

    def take(self, worker: str) -> int | None:
        """A shard for `worker`, or None when there is none left to begin."""
        if not self._free:
            return None
        shard = self._free.popleft()
        self._held.setdefault(worker, set()).add(shard)
        return shard

    def finish(self, worker: str, shard: int) -> None:
        """`shard` is written. A worker that was given up and lives on may say so of one that another holds by now."""
        self._held.get(worker, set()).discard(shard)

    def release(self, worker: str) -> list[int]:
        """Take back what `worker` held: it died."""
        shards = sorted(self._held.pop(worker, set()))
        self._free.extendleft(reversed(shards))
        return shards

    @property
    def waiting(self) -> int:
        """Shards that nobody holds."""
        return len(self._free)

    @property
    def open(self) -> int:
        """Shards that are not finished."""
        return len(self._free) + sum(len(shards) for shards in self._held.values())
