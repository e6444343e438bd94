"""What a user sees of a command: tables, and how far a long run is."""

import logging
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

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
from rich.table import Table
from rich.text import Text

_OFTEN, _SELDOM = 30.0, 60.0  # seconds between two lines: at first, and later
_AT_FIRST = 300.0


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, text_columns: int = 1
) -> Table:
    """For the terminal. The first `text_columns` columns are words, the rest are numbers, aligned to the right."""
    drawn = Table(title=Text(title))
    for i, column in enumerate(columns):
        drawn.add_column(Text(column), justify="left" if i < text_columns else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))  # no markup in cells
    return drawn


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """For the terminal: names and values, without a header."""
    drawn = table(title, ["", ""], rows.items(), text_columns=2)
    drawn.show_header = False
    return drawn


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """The same table as lines of Markdown. Bars in cells are escaped, other markup is not."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    return "\n".join(_markdown_row(cells) for cells in (columns, rule, *rows))


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in escaped)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of libraries off the terminal, about what is meant as it is."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Report(Protocol):
    """Call it with the number of units done, their total, and a few words on the state of the run."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress(
    console: Console, title: str, unit: str, *, log: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report]:
    """A bar with speed and time left on a terminal, lines of text now and then elsewhere.

    Without `log` nothing stays: the bar disappears at the end, and there are no lines. Nothing shows before the first
    call, so that a wrong input gets its one line and no more. What the first call counts as done does not count for
    the speed. `unit` is a plural, such as "images".
    """
    if console.is_terminal:
        yield from _bar(console, title, unit, transient=not log)
    elif log:
        lines = _Lines(console, unit, clock)
        try:
            yield lines
        finally:
            lines.close()
    else:
        yield lambda done, total, note="": None


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f} {self._unit}/s", style="progress.data.speed")


def _bar(console: Console, title: str, unit: str, *, transient: bool) -> Iterator[Report]:
    note_column = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    bar = Progress(*columns, note_column, console=console, transient=transient, speed_estimate_period=120)
    task = bar.add_task(title, total=None, note="")

    def report(done: int, total: int, note: str = "") -> None:
        if not bar.live.is_started:
            bar.reset(task, total=total, completed=done)
            bar.start()
        bar.update(task, completed=done, total=total, note=note)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


class _Lines:
    """A line first and last, and between them one every half minute, after some minutes every minute.

    Speed and time left come from the time since the line before the last, so that they follow a run that gets slower.
    """

    def __init__(self, console: Console, unit: str, clock: Callable[[], float]) -> None:
        self._console, self._unit, self._clock = console, unit, clock
        self._shown = deque[tuple[float, int]](maxlen=2)
        self._begun = 0.0
        self._now = 0, 0, ""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._now = done, total, note
        if not self._shown:
            self._begun = self._clock()
            self._shown.append((self._begun, done))
            self._print(f"{done:,}/{total:,} {self._unit}")
        elif self._shown[-1][1] < total and (done == total or self._is_time()):
            self._print_now()

    def close(self) -> None:
        """Where the run ended, if no line has said that yet."""
        if self._shown and self._shown[-1][1] != self._now[0]:
            self._print_now()

    def _is_time(self) -> bool:
        now = self._clock()
        return now - self._shown[-1][0] >= (_OFTEN if now - self._begun < _AT_FIRST else _SELDOM)

    def _print_now(self) -> None:
        (done, total, note), now = self._now, self._clock()
        since, before = self._shown[0]
        speed = (done - before) / max(now - since, 1e-9)
        left = f"{timedelta(seconds=round((total - done) / speed))} left" if speed and done < total else ""
        parts = (f"{done:,}/{total:,} {self._unit}", f"{speed:.2f} {self._unit}/s", left, note)
        self._print(", ".join(filter(None, parts)))
        self._shown.append((now, done))

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
