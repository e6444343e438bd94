"""make reproduce: the paper's Tables 1, 3 and 4 and Figure 4 in miniature, from class names to the report.

    make reproduce                    # up to 6 hours on 2 cores; run it again to continue
    make reproduce SIZE=small         # every path, in minutes; the figures mean nothing

PROTOCOL.md beside this file says what is compared, and how. Everything is kept below --out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import page
import tyro
from plan import SIZES, Job, jobs, runs
from rich.console import Console
from work import Crew

from ubgen.core.errors import UserError, run


@dataclass(frozen=True)
class Arguments:
    """The paper's tables in miniature: fine-tune, synthesise, pre-train, evaluate, compare."""

    size: Literal["whole", "small"] = "whole"
    """"whole" is the experiment, up to 6 hours on 2 cores; "small" takes every path in minutes."""
    out: Path | None = None
    """Directory for everything; runs/reproduce, or runs/reproduce-small."""
    results: Path | None = None
    """Directory for reproduce.md, reproduce.json and pictures; OUT if not given."""
    jobs: int = 0
    """Steps at a time, each on one core; 0: one for each core."""
    report: bool = False
    """Run nothing; write the report from what is finished."""


def reproduce(given: Arguments) -> None:
    size, console, shown = SIZES[given.size], Console(), 0
    out = given.out or Path("runs/reproduce" if given.size == "whole" else "runs/reproduce-small")
    todo, every = jobs(size, out), runs(size)

    def write_page() -> None:
        """If another whole block of seeds is finished."""
        nonlocal shown
        blocks = whole_blocks(todo)
        if blocks > shown:
            finished = [one for one in every if one.block <= blocks]
            report = page.write(finished, len(every), given.size, out, given.results or out)
            line = f"{report}: {len(finished)} of {len(every)} backbones"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            shown = blocks

    if not given.report:
        workers = given.jobs or len(os.sched_getaffinity(0))
        Crew(todo, out, workers, size.weight, console).work(write_page)
    write_page()
    if not shown:
        raise UserError(f"{out}: the first seeds are not finished; there is nothing to report yet")


def whole_blocks(todo: Sequence[Job]) -> int:
    """How many repetitions are finished, with all of the earlier ones."""
    open_blocks = {job.block for job in todo if not job.done}
    return min(open_blocks) - 1 if open_blocks else max(job.block for job in todo)


if __name__ == "__main__":
    run(lambda: reproduce(tyro.cli(Arguments, prog="make reproduce", description=__doc__)))
