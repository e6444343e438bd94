"""What the user sees of a run: lines in a log, a bar on a terminal, and nothing of a run that does not begin."""

import io

import pytest
from rich.console import Console

from ubgen.core.errors import UserError
from ubgen.synth.progress import Lines, watching


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_by_the_clock() -> None:
    """Two images a second are made for ten minutes; then four, while two hundred were there before."""
    out, clock = io.StringIO(), Clock()
    lines = Lines(Console(file=out), clock)
    done = 200
    lines.progress(done, 5000)
    for second in range(1600):
        clock.now += 1
        done += 2 if second < 600 else 4
        lines.bottlenecks({"denoise": 0.934, "decode": 0.06, "score": 0.006})
        lines.progress(min(done, 5000), 5000)
    told = out.getvalue().splitlines()
    assert told[0] == "200/5,000 images"
    assert told[1] == "260/5,000 images, 2.00 images/s, 0:39:30 left, waits for denoise 93 %, decode 6 %"
    assert told[10] == "860/5,000 images, 2.00 images/s, 0:34:30 left, waits for denoise 93 %, decode 6 %"
    assert told[11].startswith("980/5,000 images")  # five minutes are over
    assert told[17] == "2,000/5,000 images, 4.00 images/s, 0:12:30 left, waits for denoise 93 %, decode 6 %"
    assert told[-1] == "5,000/5,000 images, 4.00 images/s, waits for denoise 93 %, decode 6 %"


def fail(console: Console) -> None:
    with watching(console) as watch:
        watch.progress(0, 10)
        watch.say("worker 1 died [status -9]; its 2 shards are begun again")
        watch.progress(4, 10)
        raise OSError("full")


def test_the_line_of_a_run_that_fails_says_how_far_it_came() -> None:
    out = io.StringIO()
    with pytest.raises(OSError, match="full"):
        fail(Console(file=out, width=20))
    first, said, last = out.getvalue().splitlines()
    assert (first, said) == ("0/10 images", "worker 1 died [status -9]; its 2 shards are begun again")
    assert last.startswith("4/10 images, ")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_does_not_begin_shows_nothing(terminal: bool) -> None:
    out = io.StringIO()
    with pytest.raises(UserError), watching(Console(file=out, force_terminal=terminal)):
        raise UserError("--batch 9999")
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with watching(Console(file=out, force_terminal=True, width=120)) as watch:
        watch.progress(400, 1000)
        watch.bottlenecks({"denoise": 1.0})
        watch.progress(410, 1000)
        watch.say("a line above")
    text = out.getvalue()
    assert "410/1000" in text
    assert "waits for denoise 100 %" in text
    assert "a line above" in text
