"""The experiment of PROTOCOL-fine-tuning.md on the miniature: which terms lower the bias, and at what price.

    .venv/bin/python bench/ablation.py             # every arm and seed, one after another; hours
    .venv/bin/python bench/ablation.py --report    # only write the page, from the runs that are finished

Each run is a real `ubgen-train` and a measurement of 400 images. Called again it continues; finished runs are kept.
After every run bench/results/fine-tuning.{json,md} are written anew, with one contact sheet per arm.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.core.config import load_recipe, to_dict
from ubgen.core.files import atomic_write
from ubgen.core.stage import MANIFEST
from ubgen.train import TrainConfig

BASE = "base"
EQ8 = {
    # the paper's weights, and its learning rates times 10; none of what is ours
    "losses.entire": 1, "losses.individual": 1, "losses.quality": 0.1,
    "generator.lr": 2e-4, "discriminator.lr": 1e-4,
    "losses.class-mean": 0, "losses.class-spread": 0, "losses.trust": 0, "generator.ema": 0,
}  # fmt: skip
ARMS: dict[str, dict[str, float]] = {
    BASE: {},
    "eq8": EQ8,
    "recommended": {},
    "recommended-adversary": {"losses.entire": 1},
    "eq8-no-entire": EQ8 | {"losses.entire": 0},
    "eq8-no-individual": EQ8 | {"losses.individual": 0},
    "eq8-no-quality": EQ8 | {"losses.quality": 0},
}
HIGHER, SHARE = ("class_accuracy", "quality"), ("background_entropy", "within_class_variance")
READING = "## Reading"  # from here on fine-tuning.md is written by hand, and kept

Measures = dict[str, float]
Results = dict[str, dict[int, Measures]]
"""Of each arm, by training seed; the base generator's single row has the seed 0."""


@dataclass(frozen=True)
class Arguments:
    """Train and measure every arm with every seed, in the protocol's order."""

    work: Path = Path("runs/ablation")
    """Directory of the training runs and measurements."""
    out: Path = Path("bench/results")
    """Directory of the page."""
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    """Training seeds."""
    noise_seed: int = 3000
    """Seed of the measured images' noise."""
    per_class: int = 40
    """Images per class and run."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms."""
    updates: int | None = None
    """Updates of every run, for a trial; the recipe's if not given."""
    report: bool = False
    """Run nothing; write the page from the runs that are finished."""
    pages: bool = True
    """Write the page after every run."""


def plan(given: Arguments) -> Iterator[tuple[str, int]]:
    """(arm, seed) in order: the base generator once, then seed by seed."""
    if BASE in given.arms:
        yield BASE, 0
    for seed in given.seeds:
        for arm in given.arms:
            if arm != BASE:
                yield arm, seed


def measured(given: Arguments, arm: str, seed: int) -> Path:
    return given.work / "measured" / f"{arm}-{seed}"


def play(given: Arguments, arm: str, seed: int) -> None:
    """Train and measure, unless it was done before."""
    target, trained = measured(given, arm, seed), given.work / f"{arm}-{seed}"
    if (target / "measures.json").is_file():
        return
    generator: list[str | Path] = []
    if arm != BASE:
        if not (trained / MANIFEST).is_file():
            program = Path(sys.executable).parent / "ubgen-train"
            options = ["--recipe", "miniature", "--seed", str(seed), "--out", str(trained)]
            options += [f"--{name}={value}" for name, value in ARMS[arm].items()]
            options += ["--max-updates", str(given.updates)] if given.updates else []
            subprocess.run([program, *options], check=True)
        generator = ["--no-base", "--lora", trained]
    noise = ["--per-class", str(given.per_class), "--seed", str(given.noise_seed)]
    subprocess.run(
        [sys.executable, "-m", "ubgen.miniature.measure", *generator, *noise, "--out", target], check=True
    )


def finished(given: Arguments) -> Results:
    """What has been measured so far."""
    results: Results = {}
    for arm, seed in plan(given):
        path = measured(given, arm, seed) / "measures.json"
        if path.is_file():
            (results.setdefault(arm, {})[seed],) = json.loads(path.read_text()).values()
    return results


def cell(values: list[float]) -> str:
    """The median, and the range where there are several."""
    middle = f"{statistics.median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def reached(base: Measures, row: Measures) -> bool:
    """All that was hoped for of one run."""
    return (
        row["mutual_information"] <= 0.6 * base["mutual_information"]
        and all(row[name] >= base[name] for name in HIGHER)
        and all(row[name] >= 0.85 * base[name] for name in SHARE)
    )


def tables(results: Results, given: Arguments) -> str:
    names = [name for name in next(iter(results[BASE].values())) if name != "images"]
    base = results[BASE][0]
    main = Table("Measures", ("measure", *results), text_columns=1)
    main.rows.append(("runs", *(str(len(runs)) for runs in results.values())))
    for name in names:
        cells = (cell([row[name] for row in runs.values()]) for runs in results.values())
        main.rows.append((name.replace("_", " "), *cells))
    changes = [
        [row["mutual_information"] / base["mutual_information"] - 1 for row in runs.values()]
        for runs in results.values()
    ]
    main.rows.append(("mutual information, change", *map(cell, changes)))
    counts = (str(sum(reached(base, row) for row in runs.values())) for runs in results.values())
    main.rows.append(("runs that reach all that was hoped for", *counts))
    each = Table("Every run", ("arm", "seed", *(name.replace("_", " ") for name in names)), text_columns=1)
    for arm, runs in results.items():
        for seed, row in runs.items():
            shown = "" if arm == BASE else str(seed)
            each.rows.append((arm, shown, *(f"{row[name]:.3f}" for name in names)))
    return f"{main.markdown()}\n{each.markdown()}"


def report(results: Results, given: Arguments) -> str:
    recipe, total = load_recipe("miniature", TrainConfig), sum(1 for _ in plan(given))
    done = sum(len(runs) for runs in results.values())
    so_far = f"All {total} runs are" if done == total else f"**{done} of {total} runs are**"
    seeds, images = ", ".join(map(str, given.seeds)), 10 * given.per_class
    return f"""# Fine-tuning on the miniature

What is compared was decided before the first run: [the protocol](../PROTOCOL-fine-tuning.md). {so_far} measured.
{given.updates or recipe.max_updates} updates of {recipe.batch_size} images; training seeds {seeds}; {images} images
per run on the noise of seed {given.noise_seed}, 50 PNDM steps, guidance 2. Cells: the median over the seeds, and the
range. Made by `bench/ablation.py`. {describe(machine_record())}.

{tables(results, given)}"""


def write_page(given: Arguments) -> None:
    results = finished(given)
    if BASE not in results:
        print(f"{given.work}: the base generator is not measured yet; no page is written")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": to_dict(load_recipe("miniature", TrainConfig)),
        "arms": {arm: ARMS[arm] for arm in given.arms},
        "noise_seed": given.noise_seed,
        "measures": results,
        "machine": machine_record(),
    }
    atomic_write(given.out / "fine-tuning.json", json.dumps(record, indent=1) + "\n")
    written = given.out / "fine-tuning.md"
    reading = written.read_text().partition(READING)[2] if written.is_file() else ""
    text = report(results, given) + f"\n{READING}" + (reading or "\n\nNot written yet.\n")
    atomic_write(written, text)
    for arm, runs in results.items():
        (sheet,) = measured(given, arm, min(runs)).glob("*.png")
        atomic_write(given.out / f"fine-tuning-{arm}.png", sheet.read_bytes())


def main() -> None:
    given = tyro.cli(Arguments, prog="bench/ablation.py")
    if not given.report:
        for arm, seed in plan(given):
            play(given, arm, seed)
            if given.pages:
                write_page(given)
    if given.report or given.pages:
        write_page(given)


if __name__ == "__main__":
    main()
