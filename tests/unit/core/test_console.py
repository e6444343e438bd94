"""Tables on the terminal and in Markdown; lines in a log, a bar on a terminal, nothing of a run that does not begin."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from ubgen.core.console import facts, markdown_table, progress, table
from ubgen.core.errors import UserError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_by_the_clock() -> None:
    """Two images a second are made for ten minutes; then four, while two hundred were there before."""
    out, clock = io.StringIO(), Clock()
    done = 200
    with progress(Console(file=out), "synthesis", "images", clock=clock) as report:
        report(done, 5000)
        for second in range(1600):
            clock.now += 1
            done += 2 if second < 600 else 4
            report(min(done, 5000), 5000, "waits for denoise 93 %")
    lines = out.getvalue().splitlines()
    assert lines[0] == "200/5,000 images"
    assert lines[1] == "260/5,000 images, 2.00 images/s, 0:39:30 left, waits for denoise 93 %"
    assert lines[10] == "860/5,000 images, 2.00 images/s, 0:34:30 left, waits for denoise 93 %"
    assert lines[11].startswith("980/5,000 images")  # five minutes are over
    assert lines[17] == "2,000/5,000 images, 4.00 images/s, 0:12:30 left, waits for denoise 93 %"
    assert lines[-1] == "5,000/5,000 images, 4.00 images/s, waits for denoise 93 %"


def fail(console: Console) -> None:
    with progress(console, "synthesis", "images") as report:
        report(0, 10)
        report(4, 10)
        raise OSError("full")


def test_the_last_line_of_a_run_that_fails_says_how_far_it_came() -> None:
    out = io.StringIO()
    with pytest.raises(OSError, match="full"):
        fail(Console(file=out, width=20))
    first, last = out.getvalue().splitlines()
    assert first == "0/10 images"
    assert last.startswith("4/10 images, ")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_does_not_begin_shows_nothing(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal)
    with pytest.raises(UserError), progress(console, "synthesis", "images"):
        raise UserError("--batch 9999")
    assert out.getvalue() == ""


def test_a_log_stays_empty_where_it_wants_no_lines() -> None:
    out = io.StringIO()
    with progress(Console(file=out), "verifying", "shards", log=False) as report:
        report(1, 2)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress(console, "synthesis", "images") as report:
        report(400, 1000)
        report(410, 1000, "waits for [denoise]")
        console.print("a line above")
    text = out.getvalue()
    assert "410/1000" in text
    assert "waits for [denoise]" in text
    assert "a line above" in text


def test_a_table_shows_its_cells_as_they_are() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60)
    console.print(table("Parts [1]", ["part", "size"], [["[red]a", "1"], [Text("b"), "20"]]))
    console.print(facts("Facts", {"images": "[4]"}))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[0] == "Parts [1]"
    assert "│ [red]a │    1 │" in lines  # numbers stand at the right
    assert "│ images │ [4] │" in lines


def test_a_table_in_markdown() -> None:
    text = markdown_table(["network", "|Δ|"], [["unet", "1"], [r"a\|b", ""]])
    assert text.splitlines() == ["| network | \\|Δ\\| |", "| --- | ---: |", "| unet | 1 |", r"| a\|b | |"]
