"""ubgen-doctor: what this machine can run, and whether weights are what they should be, with the reason for each no."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

from ubgen.core.console import table
from ubgen.core.errors import UserError, run
from ubgen.core.probes import all_probes, torch_cuda


def doctor(
    stable_diffusion: str | None = None,
    clip: str | None = None,
    qalign: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Show what this machine can run, and why not; with directories of weights, check those instead.

    Weights are loaded and tried on a photograph. The exit status is 1 if one of the checks fails.

    Args:
        stable_diffusion: Stable Diffusion 1.x in diffusers layout, to be checked.
        clip: CLIP as an open_clip or a transformers directory, to be checked.
        qalign: Q-Align with the public checkpoint's files, to be checked.
        device: Where the weights are tried: "auto" is a GPU if there is one.
        json_output: Print a JSON list of {name, available, detail} instead of a table; {name, ok, detail} for weights.
    """
    if stable_diffusion is None and clip is None and qalign is None:
        _machine(json_output)
    else:
        _weights(stable_diffusion, clip, qalign, device, json_output)


def _machine(json_output: bool) -> None:
    probes = all_probes()
    if json_output:
        print(json.dumps([dataclasses.asdict(probe) for probe in probes], indent=2))
    else:
        rows = [(probe.name, probe.available, probe.detail) for probe in probes]
        _show(("part", "runs", "version, place, or reason"), rows, ("yes", "no"))


def _weights(
    stable_diffusion: str | None, clip: str | None, qalign: str | None, device: str, json_output: bool
) -> None:
    from ubgen.cli.weights import check_weights

    found = torch_cuda()
    if device == "cuda" and not found.available:
        raise UserError(f"--device cuda: {found.detail}")
    device = ("cuda" if found.available else "cpu") if device == "auto" else device
    with Console(stderr=True).status("checking"):
        checks = list(check_weights(stable_diffusion, clip, qalign, device))
    if json_output:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        rows = [(check.name, check.ok, check.detail) for check in checks]
        _show(("check", "result", "what was seen, or what is wrong"), rows, ("ok", "wrong"))
    if not all(check.ok for check in checks):
        raise SystemExit(1)


def _show(columns: Sequence[str], rows: Sequence[tuple[str, bool, str]], words: tuple[str, str]) -> None:
    cells = [
        (name, Text(words[0], style="green") if good else Text(words[1], style="yellow"), detail)
        for name, good, detail in rows
    ]
    Console().print(table("ubgen-doctor", columns, cells, text_columns=3))


def main() -> None:
    """Entry point of the `ubgen-doctor` command."""
    run(lambda: tyro.cli(doctor, prog="ubgen-doctor"), resumes=False)


if __name__ == "__main__":
    main()
