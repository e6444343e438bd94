"""ubgen-export: compile the fine-tuned networks into an engine directory."""

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from ubgen.cli._run import run
from ubgen.export import Exported, export_engine, load_spec


def export(
    spec: str,
    out: Path,
    lora: Path | None = None,
    stable_diffusion: str | None = None,
    clip: str | None = None,
    qalign: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge a LoRA, compile every network, and prove each equal to PyTorch on real inputs.

    Args:
        spec: Name of a shipped engine spec ("miniature") or the path of a TOML file.
        out: Directory of the engine.
        lora: Directory made by ubgen-train, or any with pytorch_lora_weights.safetensors; none: the base generator.
        stable_diffusion: Directory in diffusers layout, in place of the spec's.
        clip: Directory with open_clip_config.json and weights, in place of the spec's.
        qalign: Directory of the Q-Align checkpoint, in place of the spec's.
        overwrite: Replace a finished engine in the output directory.
    """
    console = Console()
    loaded = load_spec(spec, stable_diffusion=stable_diffusion, clip=clip, qalign=qalign)
    with console.status("starting") as status:
        exported = export_engine(loaded, out, lora, overwrite=overwrite, say=status.update)
    console.print(_table(exported))
    state = "written" if exported.built else "is already this engine; nothing was done"
    console.print(f"{exported.path} {state} (key {exported.key[:19]}…)")


def _table(exported: Exported) -> Table:
    table = Table(title="Engines against PyTorch on real inputs")
    for column in ("network", "rows", "max |Δ|", "relative", "within 1 level", "tolerance"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in exported.parity:
        within = "" if row.within_one_level is None else f"{row.within_one_level:.4%}"
        numbers = (f"{row.max_abs:.2e}", f"{row.max_rel:.2e}", within, f"{row.tolerance:.0e}")
        table.add_row(row.network, str(row.rows), *numbers)
    return table


def main() -> None:
    run(lambda: tyro.cli(export, prog="ubgen-export"))
