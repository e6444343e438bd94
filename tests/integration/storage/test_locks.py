"""Two runs on one place in object storage: the second refuses; a dead one does not keep the place for ever."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ubgen.core import locks
from ubgen.core.errors import UserError
from ubgen.core.stage import stage_directory
from ubgen.dataset import open_store

HOLD = """
import sys
from ubgen.core.stage import stage_directory
with stage_directory(sys.argv[1], "synth", {}):
    print("held", flush=True)
    sys.stdin.read()
"""


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


def elsewhere(age: float) -> bytes:
    about = {"host": "node7", "pid": 123, "machine": "another", "token": "t", "time": time.time() - age}
    return json.dumps(about).encode()


def enter(url: str, **options: bool) -> None:
    with stage_directory(url, "synth", {}, **options) as stage:
        stage.lock.check()


def test_the_second_refuses_and_names_the_first(url: str, holder: subprocess.Popen[str]) -> None:
    for shared in (False, True):
        with pytest.raises(UserError, match=rf"in use: process {holder.pid} on \S+ is writing to {url}$"):
            enter(url, shared=shared)
    holder.communicate("")
    assert open_store(url).names() == []
    enter(url)


def test_a_killed_one_leaves_a_lock_that_is_taken_over_at_once(
    url: str, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.communicate()
    assert open_store(url).names() == [".lock"]
    started = time.monotonic()
    enter(url, shared=True)
    enter(url)
    assert time.monotonic() - started < 10
    assert open_store(url).names() == []


def test_shared_ones_come_together_and_cannot_finish(url: str) -> None:
    with (
        stage_directory(url, "synth", {}, shared=True) as one,
        stage_directory(url, "synth", {}, shared=True),
        pytest.raises(RuntimeError, match="cannot be finished"),
    ):
        one.finish({})
    assert open_store(url).names() == []


def test_a_live_lock_of_another_machine_is_respected(url: str) -> None:
    open_store(url).write(".lock", elsewhere(30))
    with pytest.raises(UserError, match="process 123 on node7"):
        enter(url)


@pytest.mark.parametrize(
    "content",
    [elsewhere(60), elsewhere(-3600), b"{", b"[]", b'{"host": 1}'],
    ids=["old", "from the future", "half", "list", "incomplete"],
)
def test_a_dead_or_senseless_lock_is_taken_over(
    url: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEW", 0.1)
    monkeypatch.setattr(locks, "SETTLE", 0.1)
    open_store(url).write(".lock", content)
    enter(url)
    assert open_store(url).names() == []


def test_a_machine_whose_clock_is_wrong_keeps_its_lock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEW", 0.4)
    store = open_store(url)
    store.write(".lock", elsewhere(3600))
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.05):
            store.write(".lock", elsewhere(3600))

    renewal = threading.Thread(target=renew)
    renewal.start()
    with pytest.raises(UserError, match="process 123 on node7"):
        enter(url)
    done.set()
    renewal.join()


def test_the_lock_is_renewed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEW", 0.05)
    store = open_store(url)
    with stage_directory(url, "synth", {}):
        first = json.loads(store.read(".lock"))
        deadline = time.monotonic() + 10
        while json.loads(store.read(".lock"))["time"] == first["time"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(store.read(".lock"))["token"] == first["token"]


def test_one_that_lost_its_lock_cannot_finish_and_leaves_the_new_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEW", 0.05)
    store = open_store(url)
    with stage_directory(url, "synth", {}) as stage:
        taken = elsewhere(0)
        deadline = time.monotonic() + 10
        while stage.lock._taken_by is None:
            store.write(".lock", taken)  # again if a renewal came in between
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match="process 123 on node7"):
            stage.finish({})
    assert store.read(".lock") == taken
    assert store.size("manifest.json") is None


def test_of_two_that_take_over_at_the_same_time_one_succeeds(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEW", 0.1)
    open_store(url).write(".lock", elsewhere(60))
    together = threading.Barrier(3)
    outcomes: list[str] = []

    def run() -> None:
        together.wait()
        try:
            with stage_directory(url, "synth", {}):
                outcomes.append("in")
                time.sleep(2)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in", "refused", "refused"]
