"""The core of every measurement: turns, quartiles, peaks, tables, and the record of the machine."""

import json
import time
from mmap import mmap
from pathlib import Path

import pytest
import torch

from ubgen.benchmark import Table, Timing, compare, machine_record, peak_memory
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import number, write_result


def test_sides_take_turns_and_none_always_begins():
    calls = []
    sides = {name: lambda name=name: (calls.append(name), time.sleep(0.021)) for name in "abc"}
    timings = compare(sides, seconds=0.01, least=4)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]  # before anything is counted
    assert "".join(calls[6:]) == "abc" + "bca" + "cab" + "abc"
    assert all(t.rounds == 4 and t.calls == 1 and 21 <= t.q1 <= t.median <= t.q3 for t in timings.values())


def test_short_calls_are_repeated_within_a_turn():
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    timing = compare({"call": call}, seconds=0.01, least=2)["call"]
    assert timing.calls > 100
    assert count == 2 + timing.calls * timing.rounds


def test_the_seconds_bound_the_rounds():
    start = time.perf_counter()
    timing = compare({"call": lambda: time.sleep(0.03)}, seconds=0.5, least=2)["call"]
    assert time.perf_counter() - start < 5
    assert 2 <= timing.rounds <= 17


def test_summary_of_the_turns():
    assert Timing.of([4, 1, 3, 2, 100], [9, 1, 1, 2, 2], calls=7) == Timing(
        3, q1=2, q3=4, rounds=5, calls=7, cpu=2
    )
    assert Timing.of([5], [6]) == Timing(5, 5, 5, 1, 1, 6)
    assert Timing.of([20], [0]).per_second(16) == 800


def test_cpu_time_is_what_a_side_computed():
    def compute() -> None:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

    timings = compare({"waits": lambda: time.sleep(0.03), "computes": compute}, seconds=0.01, least=3)
    assert timings["waits"].cpu < 5
    assert timings["computes"].cpu >= 30


def test_peak_memory_of_a_block():
    with peak_memory() as big, mmap(-1, 100_000_000) as memory:  # malloc may have as much left from before
        memory[::4096] = bytes(len(range(0, len(memory), 4096)))
    with peak_memory() as small:
        torch.ones(1000)
    assert 90e6 < big.extra < 200e6
    assert small.extra < 50e6
    assert big.peak == big.held + big.extra


def test_a_table_in_markdown():
    table = Table("Speed", ("part", "side", "ms"), [("a|b", "eager", "1.5")], note="A note.")
    assert table.markdown() == (
        "## Speed\n\n| part | side | ms |\n| --- | --- | ---: |\n| a\\|b | eager | 1.5 |\n\nA note.\n"
    )


def test_a_page_is_replaced_and_what_people_wrote_below_it_stays(tmp_path: Path) -> None:
    def write(cell: str) -> str:
        write_result(tmp_path, "speed", {}, [Table("Speed", ("side", "ms"), [("ours", cell)], 1)])
        return (tmp_path / "speed.md").read_text()

    assert "## Reading" not in write("first")
    (tmp_path / "speed.md").write_text(write("first") + "\n## Reading\n\nQuick.\n")
    for cell in ("second", "third"):
        page = write(cell)
        assert "first" not in page
        assert f"| ours | {cell} |\n\n## Reading\n\nQuick.\n" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (1.5, "1.5"), (123.4, "123"), (999.7, "1000"), (123456.7, "123457"), (None, "")],
)
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text


def test_the_machine_record_says_what_speed_depends_on():
    record = machine_record()
    assert json.loads(json.dumps(record)) == record
    assert record["settings"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert record["cpu"] in describe(record)
    assert f"torch {torch.__version__}" in describe(record)
