"""Stages joined by bounded queues, each in a thread of its own, and the account of what every stage waited for."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

_DEPTH = 2  # batches between two stages: one that is worked on, one that is ready
_POLL = 0.05
_END = object()


class Stopped(Exception):
    """Another stage failed; `Pipeline.close` raises its error."""


@dataclass(frozen=True)
class Stage:
    """`work` turns what the stage before it gave into what the next one takes; None goes no further.

    `lanes` threads do so at the same time, each on another item: what leaves the stage is then in any order. `scope` is
    entered by each of them around everything.
    """

    name: str
    work: Callable[[Any], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    lanes: int = 1


class Pipeline:
    """Runs `stages` one after the other on everything that is `put`, all at the same time on different things.

    Memory is bounded: no more than two results wait before any stage. Use it as a context manager; an error in a
    stage stops all of them and is raised by the next `put`, `tick` or the end of the block.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.busy = {stage.name: 0.0 for stage in stages}
        self._ticks = {stage.name: 0 for stage in stages}
        self._stages = list(stages)
        self._queues: list[queue.Queue[Any]] = [queue.Queue(_DEPTH) for _ in stages]
        self._running = [stage.lanes for stage in stages]
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"ubgen-{stage.name}", daemon=True)
            for i, stage in enumerate(stages)
            for _ in range(stage.lanes)
        ]

    def __enter__(self) -> "Pipeline":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            with suppress(Stopped):
                self._give(self._queues[0], _END)
        else:
            self._stop.set()
        for thread in self._threads:
            while thread.is_alive():  # a join without a limit would not let Ctrl-C through
                thread.join(_POLL)
        if self._error is not None and (kind is None or issubclass(kind, Stopped)):
            raise self._error

    def put(self, item: Any) -> None:
        """Hand `item` to the first stage; waits while two others wait there."""
        self._give(self._queues[0], item)

    def charge(self, name: str, seconds: float) -> None:
        """Add to the busy time of `name`, which need not be a stage."""
        with self._lock:
            self.busy[name] = self.busy.get(name, 0.0) + seconds

    def check(self) -> None:
        """`Stopped` if a stage failed."""
        if self._stop.is_set():
            raise Stopped

    def tick(self) -> None:
        """Note which stage holds up the others now: the last one before which work piles up, else the first."""
        full = [stage.name for stage, q in zip(self._stages, self._queues, strict=True) if q.full()]
        self._ticks[full[-1] if full else self._stages[0].name] += 1

    def bottlenecks(self) -> dict[str, int]:
        """How often `tick` found each stage to be the one that the others wait for."""
        return dict(self._ticks)

    def _run(self, index: int) -> None:
        stage, source = self._stages[index], self._queues[index]
        target = self._queues[index + 1] if index + 1 < len(self._queues) else None
        try:
            with stage.scope():
                while (item := self._take(source)) is not _END:
                    start = time.perf_counter()
                    result = stage.work(item)
                    self.charge(stage.name, time.perf_counter() - start)
                    del item  # or it would outlive its batch by one
                    if target is not None and result is not None:
                        self._give(target, result)
                    del result
            self._end(index, target)
        except Stopped:
            pass
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _end(self, index: int, target: "queue.Queue[Any] | None") -> None:
        """A lane found no more to do: so will the others of its stage, and the last of them tells the next stage."""
        with self._lock:
            self._running[index] -= 1
            last = not self._running[index]
        if not last:
            self._give(self._queues[index], _END)
        elif target is not None:
            self._give(target, _END)

    def _take(self, source: "queue.Queue[Any]") -> Any:
        while True:
            self.check()
            try:
                return source.get(timeout=_POLL)
            except queue.Empty:
                continue

    def _give(self, target: "queue.Queue[Any]", item: Any) -> None:
        while True:
            self.check()
            try:
                return target.put(item, timeout=_POLL)
            except queue.Full:
                continue
