"""How far a run is: a bar with the time left on a terminal, lines of text in a log."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ubgen.synth.synthesise import Watch

_OFTEN, _SELDOM = 30.0, 60.0  # seconds between two lines: at first, and later
_AT_FIRST = 300.0


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Yields what `synthesise` reports to. Nothing is shown before it has images to count, so that a wrong input gets
    its one line and no more."""
    if console.is_terminal:
        yield from _bar(console)
        return
    lines = Lines(console)
    try:
        yield Watch(lines.progress, lines.say, lines.bottlenecks)
    finally:
        lines.close()


def shares_text(shares: dict[str, float], most: int) -> str:
    """ "denoise 93 %, decode 5 %" """
    top = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in top if share > 0)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f} images/s", style="progress.data.speed")


def _bar(console: Console) -> Iterator[Watch]:
    columns = (
        TextColumn("synthesis"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[waits]}"),
    )
    bar = Progress(*columns, console=console, speed_estimate_period=120)
    task = bar.add_task("synthesis", total=None, waits="")

    def progress(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.reset(task, total=total, completed=done)  # what an earlier run left says nothing of the speed
            bar.start()
        bar.update(task, completed=done)

    def bottlenecks(shares: dict[str, float]) -> None:
        bar.update(task, waits=f"waits for {shares_text(shares, 2)}")

    try:
        yield Watch(progress, bar.console.print, bottlenecks)
    finally:
        if bar.live.is_started:
            bar.stop()


class Lines:
    """A line first and last, and between them one every half minute, after some minutes every minute.

    Speed and time left are those of the last two lines' time, so that they follow a run whose speed changes.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._told = deque[tuple[float, int]](maxlen=2)
        self._begun = 0.0
        self._now = 0, 0
        self._waits = ""

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def bottlenecks(self, shares: dict[str, float]) -> None:
        self._waits = f", waits for {shares_text(shares, 2)}" if shares else ""

    def progress(self, done: int, total: int) -> None:
        self._now = done, total
        if not self._told:
            self._begun = self._clock()
            self._told.append((self._begun, done))
            self.say(f"{done:,}/{total:,} images")
        elif self._told[-1][1] < total and (done == total or self._is_time()):
            self._tell()

    def close(self) -> None:
        """Where the run ended, if that was not told."""
        if self._told and self._told[-1][1] != self._now[0]:
            self._tell()

    def _is_time(self) -> bool:
        now = self._clock()
        return now - self._told[-1][0] >= (_OFTEN if now - self._begun < _AT_FIRST else _SELDOM)

    def _tell(self) -> None:
        (done, total), now = self._now, self._clock()
        since, before = self._told[0]
        speed = (done - before) / max(now - since, 1e-9)
        left = f", {timedelta(seconds=round((total - done) / speed))} left" if speed and done < total else ""
        self.say(f"{done:,}/{total:,} images, {speed:.2f} images/s{left}{self._waits}")
        self._told.append((now, done))
