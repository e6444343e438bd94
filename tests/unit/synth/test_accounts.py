"""What several invocations tell of their speed, added up by hand."""

import json
from pathlib import Path

import pytest

from ubgen.dataset import open_store
from ubgen.synth.accounts import Account, History, Record, account_files, leave, left, together

DENOISE = Account(4, 8.0, {"denoise": 6.0}, {"denoise": 6.0, "encode": 2.0})
ENCODE = Account(2, 2.0, {"encode": 1.0}, {"encode": 2.0})


def test_accounts_are_added_and_the_worst_counts() -> None:
    whole = together([Record(0.0, DENOISE, [(0.0, 0), (8.0, 4)]), Record(0.0, ENCODE, [(0.0, 0), (2.0, 2)])])
    speed = whole.speed()
    assert (speed["images"], speed["worker_seconds"]) == (6, 10.0)
    assert speed["busy_seconds"] == {"denoise": 6.0, "encode": 1.0}
    assert speed["bottleneck_shares"] == {"denoise": 0.6, "encode": 0.4}
    assert speed["images_per_second"] == pytest.approx(6 / 8)
    assert DENOISE.images == 4


def test_what_happens_at_the_same_time_is_added() -> None:
    slow = Record(1000.0, DENOISE, [(0.0, 0), (4.0, 4)])
    late = Record(1002.0, ENCODE, [(0.0, 0), (1.0, 1), (4.0, 2)])
    assert together([late, slow]).points == [(0.0, 0), (2.0, 2), (3.0, 4), (4.0, 5), (6.0, 6)]


def test_time_in_which_nobody_works_does_not_count() -> None:
    first, second = (
        Record(1000.0, DENOISE, [(0.0, 0), (4.0, 4)]),
        Record(9000.0, ENCODE, [(0.0, 0), (2.0, 2)]),
    )
    whole = together([second, first])
    assert whole.points == [(0.0, 0), (4.0, 4), (6.0, 6)]
    assert whole.images_per_second == 1.0


def test_one_alone_stays_as_it_is_and_none_is_nothing() -> None:
    points = [(0.0, 0), (0.5, 1), (0.75, 4), (0.75, 4)]
    assert together([Record(5.0, DENOISE, points)]).points == points[:-1]
    nothing = together([]).speed()
    assert (nothing["images"], nothing["images_per_second"], nothing["throughput"]) == (0, 0.0, [])


def test_however_many_there_are_the_curve_has_few_points() -> None:
    records = [Record(float(i), DENOISE, [(j / 10, j) for j in range(500)]) for i in range(50)]
    points = together(records).points
    assert len(points) == 512
    assert points[0] == (0.0, 0)
    assert points[-1] == (pytest.approx(49 + 49.9), 50 * 499)


def test_a_history_ends_with_all_images() -> None:
    told: list[int] = []
    history = History(told.append)
    for _ in range(3):
        history.add(2)
    record = history.end(DENOISE)
    assert told == [0, 2, 4, 6]
    assert (record.points[0], record.points[-1][1]) == ((0.0, 0), 6)


def test_files_keep_everything_and_foreign_ones_do_not_count(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    records = [Record(1.0, DENOISE, [(0.0, 0), (8.0, 4)]), Record(2.0, ENCODE, [(0.0, 0), (2.0, 2)])]
    for record in records:
        leave(store, record)
    names = account_files(store.names())
    assert len(names) == 2
    damaged = [b"", b"[]", b"{}", json.dumps({"begun": 1, "account": {"x": 1}, "points": []}).encode()]
    for i, data in enumerate(damaged):
        store.write(f".account-{i:032x}.json", data)
    store.write(".account-mine.json", b"{}")
    found = left(store)
    assert sorted(found) == names
    assert sorted(found.values(), key=lambda record: record.begun) == records
