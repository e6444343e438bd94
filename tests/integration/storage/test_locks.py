"""Two runs on one place in object storage: the second refuses; a dead one does not keep the place for ever."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ubgen.core import locks
from ubgen.core.errors import UserError
from ubgen.core.files import RemoteStore
from ubgen.core.stage import Stage

HOLD = """
import sys
from ubgen.core.stage import Stage
with Stage(sys.argv[1], "synth", {}).hold():
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = json.dumps({"host": "node7", "pid": 123, "machine": "another", "token": "t"}).encode()


@pytest.fixture
def holder(url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the place."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def store(url: str) -> RemoteStore:
    return RemoteStore(url)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells times in whole seconds."""
    monkeypatch.setattr(locks, "RENEW", 0.2)
    monkeypatch.setattr(locks, "STALE", 1.5)


def enter(store: RemoteStore, *, shared: bool = False) -> None:
    with Stage(store, "synth", {}, shared=shared).hold() as stage:
        stage.lock.check()


def test_the_second_refuses_and_names_the_first(store: RemoteStore, holder: subprocess.Popen[str]) -> None:
    for shared in (False, True):
        with pytest.raises(UserError, match=rf"in use: process {holder.pid} on \S+ is writing to {store}$"):
            enter(store, shared=shared)
    holder.communicate("")
    assert store.names() == []
    enter(store)


def test_a_killed_one_leaves_a_lock_that_is_taken_over_at_once(
    store: RemoteStore, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.communicate()
    assert store.names() == [".lock-1"]
    enter(store, shared=True)
    enter(store)
    assert store.names() == []


def test_shared_ones_come_together_and_cannot_finish(store: RemoteStore) -> None:
    with (
        Stage(store, "synth", {}, shared=True).hold() as one,
        Stage(store, "synth", {}, shared=True).hold(),
        pytest.raises(RuntimeError, match="cannot be finished"),
    ):
        one.finish({})
    assert store.names() == []


@pytest.mark.usefixtures("quick")
def test_the_lock_of_another_machine_counts_while_it_is_renewed(store: RemoteStore) -> None:
    until = time.monotonic() + 3
    while time.monotonic() < until:
        store.write(".lock-7", ELSEWHERE)
        with pytest.raises(UserError, match="in use: process 123 on node7 is writing"):
            enter(store)
    time.sleep(3)
    enter(store)
    assert store.names() == []


@pytest.mark.usefixtures("quick")
def test_a_held_lock_is_renewed(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage(store, "synth", {}).hold():
        monkeypatch.setattr(locks, "_machine", lambda: "another")
        time.sleep(3)
        with pytest.raises(UserError, match="in use"):
            enter(store)


@pytest.mark.usefixtures("quick")
def test_one_that_lost_its_lock_cannot_finish_and_leaves_the_new_one(store: RemoteStore) -> None:
    with Stage(store, "synth", {}).hold() as stage:
        stage.begin()
        store.write(".lock-2", ELSEWHERE)
        store.delete(".lock-1")
        time.sleep(0.5)
        with pytest.raises(UserError, match="in use: another process"):
            stage.finish({})
    assert store.names() == [".lock-2", "run.json"]


def test_of_many_that_take_over_at_the_same_time_one_succeeds(
    store: RemoteStore, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.communicate()
    together, all_tried = threading.Barrier(4), threading.Barrier(4)
    outcomes: list[str] = []

    def run() -> None:
        together.wait()
        try:
            with Stage(store, "synth", {}).hold():
                outcomes.append("in")
                all_tried.wait(60)
        except UserError:
            outcomes.append("refused")
            all_tried.wait(60)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in", "refused", "refused", "refused"]


class Slow(RemoteStore):
    """Much happens between what a run sees of the others and its own lock."""

    meanwhile: Callable[[], None]

    def create(self, name: str, data: bytes) -> bool:
        self.meanwhile()
        return super().create(name, data)


def test_a_slow_one_does_not_join_one_that_began_meanwhile(
    store: RemoteStore, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.communicate()
    slow = Slow(store.url)
    third = Stage(store, "synth", {}).hold()

    def meanwhile() -> None:
        enter(store)  # the dead lock is gone then, and the next is the first again
        third.__enter__()

    slow.meanwhile = meanwhile
    with pytest.raises(UserError, match="in use: process"):
        enter(slow)
    assert store.names() == [".lock-1"]
    third.__exit__(None, None, None)
