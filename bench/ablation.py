"""Fine-tuning on the miniature: the full loss, and each of its terms left out, against the base generator.

    .venv/bin/python bench/ablation.py --per-class 100

Trains with the miniature recipe (the paper's Table 4 in small), measures all generators on the same noise with a seed
that no setting was chosen on, and writes bench/results/fine-tuning.{json,md} with one contact sheet per generator.
Finished training runs and measurements in runs/ablation are kept; unfinished ones are continued.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.core.config import load_recipe, to_dict
from ubgen.core.stage import MANIFEST
from ubgen.train import TrainConfig

RUNS: dict[str, list[str] | None] = {
    "full": [],
    "no-entire": ["--losses.entire", "0"],
    # the adversary waits for what the individual term raises; here it plays from the start
    "no-individual": ["--losses.individual", "0", "--losses.entire-rise", "None"],
    "no-quality": ["--losses.quality", "0"],
    "base": None,
}

READING = "## Reading"  # from here on fine-tuning.md is written by hand, and kept


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
    parallel: int = 2
    """Generators at a time, one thread each."""
    runs: tuple[str, ...] = tuple(RUNS)
    """Which generators."""


def call(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def play(name: str, given: Arguments) -> dict[str, float]:
    """Train and measure one generator; returns its measures and the minutes that training took."""
    overrides, run, measured = RUNS[name], given.work / name, given.work / "measured" / name
    if overrides is not None and not (run / MANIFEST).is_file():
        start = time.monotonic()
        call([Path(sys.executable).parent / "ubgen-train", "--recipe", "miniature", "--out", run, *overrides])
        (given.work / f"{name}.minutes").write_text(f"{(time.monotonic() - start) / 60:.2f}")
    if not (measured / "measures.json").is_file():
        lora: list[str | Path] = ["--no-base", "--lora", run] if overrides is not None else []
        noise = ["--per-class", str(given.per_class), "--seed", str(given.seed)]
        call([sys.executable, "-m", "ubgen.miniature.measure", *lora, *noise, "--out", measured])
    (measures,) = json.loads((measured / "measures.json").read_text()).values()
    took = given.work / f"{name}.minutes"
    return {**measures, **({"minutes_of_training": float(took.read_text())} if took.is_file() else {})}


def report(rows: dict[str, dict[str, float]], machine: dict[str, Any], given: Arguments) -> str:
    recipe = load_recipe("miniature", TrainConfig)
    table = Table("Measures", ("measure", *rows), text_columns=1)
    for measure in dict.fromkeys(key for row in rows.values() for key in row):
        shown = (f"{row[measure]:.4g}" if measure in row else "" for row in rows.values())
        table.rows.append((measure.replace("_", " "), *shown))
    return f"""# Fine-tuning on the miniature

Miniature recipe, {recipe.max_updates} updates of {recipe.batch_size} images; {given.per_class} images per class on the
noise of seed {given.seed}, 50 PNDM steps, guidance 2. Made by `bench/ablation.py`; pictures beside this file, one
column per class. {describe(machine)}.

{table.markdown()}"""


def main() -> None:
    given = tyro.cli(Arguments, prog="bench/ablation.py")
    with ThreadPoolExecutor(given.parallel) as pool:
        played = dict(zip(given.runs, pool.map(lambda name: play(name, given), given.runs), strict=True))
    rows = {name: played[name] for name in sorted(given.runs, key=lambda name: name != "base")}
    given.out.mkdir(parents=True, exist_ok=True)
    machine = machine_record()
    record = {"recipe": to_dict(load_recipe("miniature", TrainConfig)), "measures": rows, "machine": machine}
    (given.out / "fine-tuning.json").write_text(json.dumps(record, indent=2) + "\n")
    written = given.out / "fine-tuning.md"
    before = written.read_text() if written.is_file() else ""
    reading = before.partition(READING)[2] or "\n\n(not written yet)\n"
    written.write_text(report(rows, machine, given) + "\n" + READING + reading)
    for name in rows:
        (sheet,) = (given.work / "measured" / name).glob("*.png")
        (given.out / f"fine-tuning-{name}.png").write_bytes(sheet.read_bytes())


if __name__ == "__main__":
    main()
