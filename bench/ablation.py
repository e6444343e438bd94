"""The experiment of PROTOCOL-fine-tuning.md on the miniature: which terms lower the bias, and at what price.

    .venv/bin/python bench/ablation.py             # the choice of settings, then every arm and seed; hours
    .venv/bin/python bench/ablation.py --report    # only write the page, from the runs that are finished

Each run is a real `ubgen-train` and a measurement of 400 images. Called again it continues; finished runs are kept.
After every run bench/results/fine-tuning.{json,md} are written anew, with one contact sheet per arm.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_page
from ubgen.core.files import atomic_write
from ubgen.core.stage import MANIFEST

Options = dict[str, float]
Measures = dict[str, float]

BASE, EQ8 = "base", "miniature-eq8"
OURS: Options = {
    "losses.entire": 0,
    "losses.quality": 2,
    "losses.trust": 0,
    "generator.ema": 0.95,
    "generator.lr": 2e-4,
}
CANDIDATES: dict[str, Options] = {
    "a": OURS | {"losses.class-mean": 5, "losses.class-spread": 1, "losses.individual": 10},
    "b": OURS | {"losses.class-mean": 2, "losses.class-spread": 0.5, "losses.individual": 10},
    "c": OURS
    | {"losses.class-mean": 5, "losses.class-spread": 1, "losses.individual": 10}
    | {"losses.trust": 20, "generator.lr": 1e-4},
}
RECOMMENDED = "recommended"
FIGURES = (
    "clip_similarity",
    "class_accuracy",
    "quality",
    "biased_background",
    "mutual_information",
    "background_entropy",
    "within_class_variance",
)


@dataclass(frozen=True)
class Arguments:
    """Choose the settings, then train and measure every arm with every seed, in the protocol's order."""

    work: Path = Path("runs/ablation")
    """Directory of the training runs and measurements."""
    out: Path = Path("bench/results")
    """Directory of the page."""
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    """Training seeds of the final runs."""
    choice_seeds: tuple[int, ...] = (1, 2)
    """Training seeds on which the settings are chosen."""
    per_class: int = 40
    """Images per class and run."""
    updates: int = 200
    """Updates of each run."""
    report: bool = False
    """Run nothing; write the page from the runs that are finished."""


@dataclass(frozen=True)
class Trial:
    """One generator, trained and measured. Without updates it is the base generator."""

    name: str
    seed: int = 0
    noise: int = 3000
    updates: int = 0
    options: Options = field(default_factory=dict)
    recipe: str = "miniature"

    def trained(self, work: Path) -> Path:
        return work / f"{self.name}-{self.seed}"

    def measured(self, work: Path) -> Path:
        return work / "measured" / f"{self.name}-{self.seed}"

    def play(self, given: Arguments) -> None:
        """Train and measure, unless it was done before."""
        if self.measures(given.work) is not None:
            return
        trained, generator = self.trained(given.work), list[str | Path]()
        if self.updates:
            if not (trained / MANIFEST).is_file():
                program = Path(sys.executable).parent / "ubgen-train"
                options = [f"--{name}={value}" for name, value in self.options.items()]
                options += ["--seed", str(self.seed), "--max-updates", str(self.updates)]
                subprocess.run([program, "--recipe", self.recipe, *options, "--out", trained], check=True)
            generator = ["--no-base", "--lora", trained]
        noise = ["--per-class", str(given.per_class), "--seed", str(self.noise)]
        measure = [sys.executable, "-m", "ubgen.miniature.measure", *generator, *noise]
        subprocess.run([*measure, "--out", self.measured(given.work)], check=True)

    def measures(self, work: Path) -> Measures | None:
        path = self.measured(work) / "measures.json"
        if not path.is_file():
            return None
        (found,) = json.loads(path.read_text()).values()
        return dict(found)


def choice(given: Arguments) -> list[Trial]:
    """The base generator, then seed by seed every candidate, on the noise of seed 5."""
    runs = [
        Trial(f"choice-{name}", seed, 5, given.updates, options)
        for seed in given.choice_seeds
        for name, options in CANDIDATES.items()
    ]
    return [Trial(f"choice-{BASE}", noise=5), *runs]


def chosen(given: Arguments) -> str | None:
    """The candidate that the protocol's rule takes; None until all runs of the choice are measured."""
    trials = choice(given)
    found = {(trial.name, trial.seed): trial.measures(given.work) for trial in trials}
    rows = {key: row for key, row in found.items() if row is not None}
    if len(rows) < len(found):
        return None
    base = rows[f"choice-{BASE}", 0]
    medians = {
        name: {
            figure: statistics.median(rows[f"choice-{name}", seed][figure] for seed in given.choice_seeds)
            for figure in FIGURES
        }
        for name in CANDIDATES
    }
    return min(
        CANDIDATES, key=lambda name: (missed(base, medians[name]), medians[name]["mutual_information"])
    )


def missed(base: Measures, row: Measures) -> float:
    """What a setting misses of what it must keep, as shares of the base's figures; 0 if it keeps all."""
    kept = {
        "class_accuracy": base["class_accuracy"] - 0.02,
        "quality": base["quality"],
        "background_entropy": 0.85 * base["background_entropy"],
        "within_class_variance": 0.85 * base["within_class_variance"],
    }
    return sum(max(0.0, least - row[name]) / base[name] for name, least in kept.items())


def arms(options: Options) -> dict[str, tuple[str, Options]]:
    """Every arm but the base generator: its recipe, and what is changed there. `options` are the recommended ones."""
    return {
        "eq8": (EQ8, {}),
        RECOMMENDED: ("miniature", options),
        f"{RECOMMENDED}-adversary": ("miniature", options | {"losses.entire": 1}),
        "eq8-no-entire": (EQ8, {"losses.entire": 0}),
        "eq8-no-individual": (EQ8, {"losses.individual": 0}),
        "eq8-no-quality": (EQ8, {"losses.quality": 0}),
    }


def final(given: Arguments) -> list[Trial]:
    """The base generator, then seed by seed every arm. Without a choice there are no recommended arms."""
    name = chosen(given)
    found = arms(CANDIDATES.get(name or "", {}))
    if name is None:
        found = {arm: made for arm, made in found.items() if not arm.startswith(RECOMMENDED)}
    runs = [
        Trial(arm, seed, 3000, given.updates, options, recipe)
        for seed in given.seeds
        for arm, (recipe, options) in found.items()
    ]
    return [Trial(BASE), *runs]


def cell(values: list[float]) -> str:
    """The median, and the range where there are several."""
    middle = f"{statistics.median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def reached(base: Measures, row: Measures) -> bool:
    """All that was hoped for of one run."""
    return (
        row["mutual_information"] <= 0.6 * base["mutual_information"]
        and all(row[name] >= base[name] for name in ("class_accuracy", "quality"))
        and all(row[name] >= 0.85 * base[name] for name in ("background_entropy", "within_class_variance"))
    )


def main_table(trials: list[Trial], given: Arguments) -> Table:
    """Median and range over the seeds."""
    results: dict[str, list[Measures]] = {}
    for trial in trials:
        if (row := trial.measures(given.work)) is not None:
            results.setdefault(trial.name, []).append(row)
    table = Table("Measures", ("measure", *results), text_columns=1)
    table.rows.append(("runs", *(str(len(rows)) for rows in results.values())))
    for name in FIGURES:
        cells = (cell([row[name] for row in rows]) for rows in results.values())
        table.rows.append((name.replace("_", " "), *cells))
    (base,) = results[BASE]
    changes = (
        cell([row["mutual_information"] / base["mutual_information"] - 1 for row in rows])
        for rows in results.values()
    )
    table.rows.append(("mutual information, change", *changes))
    counts = (str(sum(reached(base, row) for row in rows)) for rows in results.values())
    table.rows.append(("runs that reach all that was hoped for", *counts))
    return table


def runs_table(title: str, trials: list[Trial], given: Arguments) -> Table:
    table = Table(title, ("run", "seed", *(name.replace("_", " ") for name in FIGURES)), text_columns=1)
    for trial in trials:
        if (row := trial.measures(given.work)) is not None:
            seed = str(trial.seed) if trial.updates else ""
            table.rows.append((trial.name, seed, *(f"{row[name]:.3f}" for name in FIGURES)))
    return table


def candidates_table(given: Arguments) -> Table:
    names = list(dict.fromkeys(name for options in CANDIDATES.values() for name in options))
    table = Table("Choice of settings", ("candidate", *names), text_columns=1)
    for candidate, options in CANDIDATES.items():
        table.rows.append((candidate, *(f"{options[name]:g}" if name in options else "" for name in names)))
    taken = chosen(given)
    table.note = (
        f"Taken by the protocol's rule: **{taken}**."
        if taken
        else "Not all of its runs are measured: nothing is taken yet."
    )
    return table


def report(given: Arguments) -> None:
    trials, tried = final(given), choice(given)
    done = [trial for trial in trials if trial.measures(given.work) is not None]
    total = 1 + len(given.seeds) * len(arms({}))
    if not any(trial.name == BASE for trial in done):
        print(f"{given.work}: the base generator is not measured yet; no page is written")
        return
    seeds, choice_seeds = (", ".join(map(str, each)) for each in (given.seeds, given.choice_seeds))
    images = 10 * given.per_class
    so_far = (
        f"All {total} final runs are" if len(done) == total else f"**{len(done)} of {total} final runs are**"
    )
    text = f"""# Fine-tuning on the miniature

What is compared was decided before the first run: [the protocol](../PROTOCOL-fine-tuning.md). {so_far} measured.
{given.updates} updates of 16 images; training seeds {seeds}; {images} images per run on the noise of
seed 3000, 50 PNDM steps, guidance 2. Cells: the median over the seeds, and the range. Made by `bench/ablation.py`.
{describe(machine_record())}.

{main_table(trials, given).markdown()}
{runs_table("Every final run", trials, given).markdown()}
{candidates_table(given).markdown()}
Their runs: as many updates, training seeds {choice_seeds}, {images} images on the noise of seed 5.

{runs_table("Runs of the choice", tried, given).markdown()}"""
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "arms": arms(CANDIDATES.get(chosen(given) or "", {})),
        "candidates": CANDIDATES,
        "chosen": chosen(given),
        "final": {f"{t.name}-{t.seed}": t.measures(given.work) for t in done},
        "choice": {f"{t.name}-{t.seed}": t.measures(given.work) for t in tried},
        "machine": machine_record(),
    }
    atomic_write(given.out / "fine-tuning.json", json.dumps(record, indent=1) + "\n")
    write_page(given.out / "fine-tuning.md", text)
    for trial in {trial.name: trial for trial in reversed(done)}.values():  # the first seed's picture
        (sheet,) = trial.measured(given.work).glob("*.png")
        atomic_write(given.out / f"fine-tuning-{trial.name}.png", sheet.read_bytes())


def main() -> None:
    given = tyro.cli(Arguments, prog="bench/ablation.py")
    if not given.report:
        for trial in choice(given):
            trial.play(given)
        for trial in final(given):
            trial.play(given)
            report(given)
    report(given)


if __name__ == "__main__":
    main()
