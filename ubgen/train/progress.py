"""How far the run is: a bar with the time left on a terminal, lines of text in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[dict[str, float]], None]
SHOWN = {
    "loss": "loss {:.3f}",
    "clip_similarity": "similarity {:.3f}",
    "quality": "quality {:.2f}",
    "discriminator_accuracy": "D right {:.0%}",
    "images_per_second": "{:.2g} images/s",
}


@contextmanager
def progress(console: Console, done: int, total: int) -> Iterator[Advance]:
    """Yields the function to call with each update's metrics."""
    if not console.is_terminal:
        yield _lines(console, done, total)
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left, {task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", completed=done, total=total)
        yield lambda metrics: bar.update(task, advance=1, description=figures(metrics))


def figures(metrics: dict[str, float]) -> str:
    """The few numbers worth watching."""
    return ", ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


def _lines(console: Console, done: int, total: int) -> Advance:
    """A line for every twentieth of the run."""
    start, first = time.perf_counter(), done

    def advance(metrics: dict[str, float]) -> None:
        nonlocal done
        done += 1
        if done % max(1, total // 20) == 0 or done == total:
            left = (time.perf_counter() - start) / (done - first) * (total - done)
            console.print(f"{done}/{total}, {timedelta(seconds=round(left))} left, {figures(metrics)}")

    return advance
