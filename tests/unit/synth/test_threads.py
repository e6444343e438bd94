"""Steps that run at the same time: order, bounded memory, errors, and whom the others wait for."""

import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from ubgen.synth.threads import Step, Steps, Stopped


def test_everything_passes_every_step_in_order() -> None:
    seen: list[int] = []
    steps = [
        Step("double", lambda x: 2 * x),
        Step("odd ones go no further", lambda x: x if x % 4 == 0 else None),
        Step("keep", seen.append),
    ]
    with Steps(steps) as line:
        for i in range(100):
            line.put(i)
    assert seen == [2 * i for i in range(0, 100, 2)]


def test_steps_overlap() -> None:
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

    with Steps([Step("first", first), Step("second", second)]) as line:
        line.put(0)
        line.put(1)


def test_threads_work_on_several_items_at_once_and_lose_none() -> None:
    met = threading.Barrier(3, timeout=10)
    seen: list[int] = []
    steps = [Step("three", lambda x: (met.wait(), x)[1], threads=3), Step("keep", seen.append, threads=2)]
    with Steps(steps) as line:
        for i in range(30):
            line.put(i)
    assert sorted(seen) == list(range(30))


def test_memory_is_bounded_however_slow_the_last_step_is() -> None:
    begun = []
    go_on = threading.Event()
    with Steps(
        [Step("quick", lambda x: begun.append(x) or x), Step("stuck", lambda x: go_on.wait())]
    ) as line:
        putter = threading.Thread(target=lambda: [line.put(i) for i in range(50)])
        putter.start()
        time.sleep(0.3)
        assert len(begun) <= 4  # one in the stuck step, two before it, one in hand
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
    line = Steps([Step(str(i), w) for i, w in enumerate(work)])
    with pytest.raises(OSError, match="No space left"):
        put_all(line, range(1000))
    with pytest.raises(Stopped):
        line.check()


def put_all(line: Steps, items: Iterable[int]) -> None:
    with line:
        for item in items:
            line.put(item)


def test_the_callers_error_is_not_hidden() -> None:
    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    line = Steps([Step("a", lambda x: x)])
    with pytest.raises(KeyboardInterrupt):
        put_all(line, interrupted())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ubgen-")]


@pytest.mark.parametrize("slow", ["first", "second", "third"])
def test_the_slow_step_is_found(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubgen.synth.threads._TICK", 0.005)

    def step(name: str) -> Step:
        return Step(name, lambda x: time.sleep(0.02 if name == slow else 0.001) or x)

    with Steps([step(name) for name in ("first", "second", "third")]) as line:
        for i in range(40):
            line.put(i)
    found = line.bottlenecks
    assert max(found, key=lambda name: found[name]) == slow
    assert found[slow] > 0.6 * sum(found.values())
    assert line.busy[slow] > 0.7 * sum(line.busy.values())
