"""The order in which a worker makes its images: those to be drawn again first, then the next ones of its shards."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ubgen.synth.plan import Item, Plan

_POLL = 0.05


class Feed:
    """Full batches for as long as there is anything to fill them with; a batch mixes classes and shards freely.

    `take` gives the number of a shard to begin with, or None when there is none left.
    """

    def __init__(self, plan: Plan, take: Callable[[], int | None]) -> None:
        self._new = self._items(plan, take)
        self._again: deque[Item] = deque()
        self._undecided = 0
        self._changed = threading.Condition()

    def next(self, size: int, check: Callable[[], None] = lambda: None) -> list[Item]:
        """The next batch: `size` items, fewer only when no others can come any more, none at the end.

        While images are undecided that might have to be drawn again, it waits, and calls `check` meanwhile.
        """
        batch = self._some(size)
        while len(batch) < size:
            with self._changed:
                if not self._again:
                    if not self._undecided:
                        break
                    self._changed.wait(_POLL)
            check()
            batch += self._some(size - len(batch))
        with self._changed:
            self._undecided += len(batch)
        return batch

    def decided(self, count: int, again: Sequence[Item]) -> None:
        """Of `count` images it is known what becomes of them: these are drawn again."""
        with self._changed:
            self._undecided -= count
            self._again.extend(again)
            self._changed.notify_all()

    def _some(self, size: int) -> list[Item]:
        with self._changed:
            batch = [self._again.popleft() for _ in range(min(size, len(self._again)))]
        while len(batch) < size and (item := next(self._new, None)):
            batch.append(item)
        return batch

    @staticmethod
    def _items(plan: Plan, take: Callable[[], int | None]) -> Iterator[Item]:
        while (shard := take()) is not None:
            yield from plan.shard_items(shard)
