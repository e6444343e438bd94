"""Fine-tuning on the miniature: the full loss, and each of its terms left out, against the base generator.

    .venv/bin/python bench/ablation.py --per-class 100

Trains with the miniature recipe (the paper's Table 4 in small), measures all generators on the same noise with seeds
that no setting was chosen on, and writes bench/results/fine-tuning.{json,md} with one contact sheet per generator.
Training runs are kept and continued in runs/ablation.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import tyro

from ubgen.config import load_recipe, to_dict
from ubgen.manifest import MANIFEST
from ubgen.miniature.measure import Arguments as MeasureArguments
from ubgen.miniature.measure import Measures, compare
from ubgen.train import TrainConfig

RUNS: dict[str, list[str]] = {
    "full": [],
    "no-entire": ["--losses.entire", "0"],
    "no-individual": ["--losses.individual", "0"],
    "no-quality": ["--losses.quality", "0"],
}


@dataclass(frozen=True)
class Arguments:
    """Compare the losses on the miniature."""

    work: Path = Path("runs/ablation")
    """Directory of the training runs."""
    out: Path = Path("bench/results")
    """Directory of the figures."""
    per_class: int = 100
    """Images per class and generator."""
    seed: int = 1000
    """Seed of the measured images' noise."""


def train(work: Path, name: str, overrides: list[str]) -> float | None:
    """Wall-clock minutes, or None when the run was finished before."""
    if (work / name / MANIFEST).is_file():
        return None
    start = time.monotonic()
    program = Path(sys.executable).parent / "ubgen-train"
    subprocess.run([program, "--recipe", "miniature", "--out", work / name, *overrides], check=True)
    return (time.monotonic() - start) / 60


def report(rows: dict[str, Measures], minutes: dict[str, float | None], given: Arguments) -> str:
    recipe = load_recipe("miniature", TrainConfig)
    lines = [f"| measure | {' | '.join(rows)} |", "| --- " * (len(rows) + 1) + "|"]
    for f in fields(Measures):
        values = (getattr(m, f.name) for m in rows.values())
        shown = " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        lines.append(f"| {f.name.replace('_', ' ')} | {shown} |")
    taken = ", ".join(f"{name} {m:.1f} min" for name, m in minutes.items() if m is not None)
    return (
        f"""# Fine-tuning on the miniature

Miniature recipe, {recipe.max_updates} updates of {recipe.batch_size} images. {given.per_class} images per class on the
noise of seed {given.seed}, 50 PNDM steps, guidance 2. {platform.machine()}, torch {torch.__version__},
{torch.get_num_threads()} threads. Training took: {taken or "not timed in this run"}.

"""
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    given = tyro.cli(Arguments, prog="bench/ablation.py")
    minutes = {name: train(given.work, name, overrides) for name, overrides in RUNS.items()}
    loras = tuple(given.work / name for name in RUNS)
    rows = compare(
        MeasureArguments(lora=loras, per_class=given.per_class, seed=given.seed, out=given.work / "measured")
    )
    named = {Path(name).name: m for name, m in rows.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": to_dict(load_recipe("miniature", TrainConfig)),
        "measures": {k: asdict(m) for k, m in named.items()},
        "minutes": minutes,
        "torch": torch.__version__,
    }
    (given.out / "fine-tuning.json").write_text(json.dumps(record, indent=2) + "\n")
    (given.out / "fine-tuning.md").write_text(report(named, minutes, given))
    for sheet in (given.work / "measured").glob("*.png"):
        (given.out / f"fine-tuning-{sheet.name}").write_bytes(sheet.read_bytes())


if __name__ == "__main__":
    main()
