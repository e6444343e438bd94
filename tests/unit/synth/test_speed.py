"""The speed of several invocations, added up by hand."""

import json
from pathlib import Path

import pytest

from ubgen.dataset import open_store
from ubgen.synth.speed import History, Speed, leave, speed_files, throughput, total

DENOISE = Speed(4, 8.0, {"denoise": 6.0}, {"denoise": 6.0, "encode": 2.0}, [(1000.0, 0), (1008.0, 4)])
ENCODE = Speed(2, 2.0, {"encode": 1.0}, {"encode": 2.0}, [(1000.0, 0), (1002.0, 2)])


def test_what_invocations_left_is_added_and_damaged_files_do_not_count(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for speed in (DENOISE, ENCODE):
        leave(store, speed)
    damaged = [b"", b"[]", b"{}", json.dumps({"images": 1, "speed": 2}).encode()]
    for i, data in enumerate(damaged):
        store.write(f"speed-{i:032x}.json", data)
    store.write("notes.json", b"{}")
    files = speed_files(store.names())
    assert len(files) == 6
    assert total(store, files) == {
        "images": 6,
        "images_per_second": pytest.approx(6 / 8),
        "worker_seconds": 10.0,
        "busy_seconds": {"denoise": 6.0, "encode": 1.0},
        "bottleneck_shares": {"denoise": 0.6, "encode": 0.4},
        "throughput": [(0.0, 0), (2.0, 2), (8.0, 6)],
    }


def test_nothing_left_is_nothing(tmp_path: Path) -> None:
    nothing = total(open_store(tmp_path), [])
    assert (nothing["images"], nothing["images_per_second"], nothing["throughput"]) == (0, 0.0, [])


def test_what_happens_at_the_same_time_is_added() -> None:
    slow, late = [(1000.0, 0), (1004.0, 4)], [(1002.0, 0), (1003.0, 1), (1006.0, 2)]
    assert throughput([late, slow]) == [(0.0, 0), (2.0, 0), (3.0, 1), (4.0, 5), (6.0, 6)]


def test_time_in_which_nobody_works_does_not_count() -> None:
    first, second = [(1000.0, 0), (1004.0, 4)], [(9000.0, 0), (9002.0, 2)]
    assert throughput([second, first]) == [(0.0, 0), (4.0, 4), (6.0, 6)]


def test_however_many_there_are_the_curve_has_few_points() -> None:
    runs = [[(i + j / 10, j) for j in range(500)] for i in range(50)]
    points = throughput(runs)
    assert len(points) == 512
    assert points[0] == (0.0, 0)
    assert points[-1] == (pytest.approx(49 + 49.9), 50 * 499)


def test_a_history_ends_with_all_images() -> None:
    told: list[int] = []
    history = History(told.append)
    for _ in range(3):
        history.add(2)
    points = history.points()
    assert told == [0, 2, 4, 6]
    assert (points[0][1], points[-1][1]) == (0, 6)
