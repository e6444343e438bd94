"""Stages that run at the same time: order, bounded memory, errors, and whom the others wait for."""

import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from ubgen.synth.pipeline import Pipeline, Stage, Stopped


def test_everything_passes_every_stage_in_order() -> None:
    seen: list[int] = []
    stages = [
        Stage("double", lambda x: 2 * x),
        Stage("odd ones go no further", lambda x: x if x % 4 == 0 else None),
        Stage("keep", seen.append),
    ]
    with Pipeline(stages) as pipeline:
        for i in range(100):
            pipeline.put(i)
    assert seen == [2 * i for i in range(0, 100, 2)]


def test_stages_overlap() -> None:
    """Each of the two waits, in the middle of its work, for the other to have begun on another item."""
    first_on_1, second_on_0 = threading.Event(), threading.Event()

    def first(x: int) -> int:
        if x == 1:
            first_on_1.set()
            assert second_on_0.wait(10)
        return x

    def second(x: int) -> None:
        if x == 0:
            second_on_0.set()
            assert first_on_1.wait(10)

    with Pipeline([Stage("first", first), Stage("second", second)]) as line:
        line.put(0)
        line.put(1)


def test_lanes_work_on_several_items_at_once_and_lose_none() -> None:
    met = threading.Barrier(3, timeout=10)
    seen: list[int] = []
    stages = [Stage("three", lambda x: (met.wait(), x)[1], lanes=3), Stage("keep", seen.append, lanes=2)]
    with Pipeline(stages) as line:
        for i in range(30):
            line.put(i)
    assert sorted(seen) == list(range(30))


def test_memory_is_bounded_however_slow_the_last_stage_is() -> None:
    begun = []
    go_on = threading.Event()
    with Pipeline(
        [Stage("quick", lambda x: begun.append(x) or x), Stage("stuck", lambda x: go_on.wait())]
    ) as line:
        putter = threading.Thread(target=lambda: [line.put(i) for i in range(50)])
        putter.start()
        time.sleep(0.3)
        assert len(begun) <= 4  # one in the stuck stage, two before it, one in hand
        go_on.set()
        putter.join()
    assert len(begun) == 50


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_stops_everything_and_is_raised(at: int) -> None:
    def fail(x: int) -> int:
        if x == 3:
            raise OSError(28, "No space left on device", "shard")
        return x

    work = [lambda x: x, lambda x: None]
    work[at] = fail
    line = Pipeline([Stage(str(i), w) for i, w in enumerate(work)])
    with pytest.raises(OSError, match="No space left"):
        put_all(line, range(1000))
    with pytest.raises(Stopped):
        line.check()


def put_all(line: Pipeline, items: Iterable[int]) -> None:
    with line:
        for item in items:
            line.put(item)


def test_the_callers_error_is_not_hidden() -> None:
    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    line = Pipeline([Stage("a", lambda x: x)])
    with pytest.raises(KeyboardInterrupt):
        put_all(line, interrupted())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ubgen-")]


@pytest.mark.parametrize("slow", ["first", "second", "third"])
def test_the_slow_stage_is_found(slow: str) -> None:
    def stage(name: str) -> Stage:
        return Stage(name, lambda x: time.sleep(0.02 if name == slow else 0.001) or x)

    over = threading.Event()
    with Pipeline([stage(name) for name in ("first", "second", "third")]) as line:

        def tick() -> None:
            while not over.wait(0.005):
                line.tick()

        thread = threading.Thread(target=tick)
        thread.start()
        for i in range(40):
            line.put(i)
        over.set()
        thread.join()
    found = line.bottlenecks()
    assert max(found, key=lambda name: found[name]) == slow
    assert found[slow] > 0.6 * sum(found.values())
    assert line.busy[slow] > 0.7 * sum(line.busy.values())
