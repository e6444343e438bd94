"""ubgen-doctor: what this machine can run, and the reason for each no."""

import dataclasses
import json
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ubgen.core.console import table
from ubgen.core.errors import run
from ubgen.core.probes import Probe, all_probes


def doctor(json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Show what this machine can run, and why not.

    Args:
        json_output: Print a JSON list of {name, available, detail} instead of a table.
    """
    probes = all_probes()
    if json_output:
        print(json.dumps([dataclasses.asdict(probe) for probe in probes], indent=2))
    else:
        Console().print(_table(probes))


def _table(probes: list[Probe]) -> Table:
    verdicts = [
        Text("yes", style="green") if probe.available else Text("no", style="yellow") for probe in probes
    ]
    rows = [(probe.name, verdict, probe.detail) for probe, verdict in zip(probes, verdicts, strict=True)]
    return table("ubgen-doctor", ("part", "runs", "version, place, or reason"), rows, text_columns=3)


def main() -> None:
    """Entry point of the `ubgen-doctor` command."""
    run(lambda: tyro.cli(doctor, prog="ubgen-doctor"), resumes=False)


if __name__ == "__main__":
    main()
