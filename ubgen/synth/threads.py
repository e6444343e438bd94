"""Steps that work at the same time, each in threads of its own, joined by bounded queues."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

_DEPTH = 2  # items between two steps: one that is worked on, one that is ready
_POLL = 0.05
_TICK = 0.1  # seconds between two looks at which step the others wait for
_END = object()


class Stopped(Exception):
    """Another step failed; leaving the block of `Steps` raises its error."""


@dataclass(frozen=True)
class Step:
    """`work` turns what the step before it gave into what the next one takes; None goes no further.

    With several `threads` items leave the step in any order. Each thread enters `scope` around everything.
    """

    name: str
    work: Callable[[Any], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    threads: int = 1


class Steps:
    """Runs `steps` one after the other on everything that is `put`, all at the same time on different items.

    Memory is bounded: no more than two results wait before any step. Use it as a context manager; an error in a step
    stops all of them and is raised at the end of the block.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.busy = {step.name: 0.0 for step in steps}
        """Seconds that each step worked."""
        self.bottlenecks = {step.name: 0 for step in steps}
        """How often each step was found to be the one that the others waited for."""
        self._steps = list(steps)
        self._queues: list[queue.Queue[Any]] = [queue.Queue(_DEPTH) for _ in steps]
        self._running = [step.threads for step in steps]
        self._stop, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"ubgen-{step.name}", daemon=True)
            for i, step in enumerate(steps)
            for _ in range(step.threads)
        ]
        self._watch = threading.Thread(target=self._find_bottlenecks, name="ubgen-watch", daemon=True)

    def __enter__(self) -> "Steps":
        for thread in (*self._threads, self._watch):
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
        self._over.set()
        self._watch.join()
        if self._error is not None and (kind is None or issubclass(kind, Stopped)):
            raise self._error

    def put(self, item: Any) -> None:
        """Hand `item` to the first step; waits while two others wait there."""
        self._give(self._queues[0], item)

    def charge(self, name: str, seconds: float) -> None:
        """Add to the busy time of `name`, which need not be a step."""
        with self._lock:
            self.busy[name] = self.busy.get(name, 0.0) + seconds

    def check(self) -> None:
        """`Stopped` if a step failed."""
        if self._stop.is_set():
            raise Stopped

    def _find_bottlenecks(self) -> None:
        """It is the last step before which work piles up, else the first."""
        while True:  # once at least, however short the run is
            full = [step.name for step, q in zip(self._steps, self._queues, strict=True) if q.full()]
            self.bottlenecks[full[-1] if full else self._steps[0].name] += 1
            if self._over.wait(_TICK):
                return

    def _run(self, index: int) -> None:
        step, source = self._steps[index], self._queues[index]
        target = self._queues[index + 1] if index + 1 < len(self._queues) else None
        try:
            with step.scope():
                while (item := self._take(source)) is not _END:
                    start = time.perf_counter()
                    result = step.work(item)
                    self.charge(step.name, time.perf_counter() - start)
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
        """A thread found no more to do: so will the others of its step, and the last of them tells the next step."""
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
