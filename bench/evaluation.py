"""The miniature's backbones through `ubgen-eval all`, and FashionMNIST transfer of them beside raw pixels.

    .venv/bin/python bench/evaluation.py --data runs/benchmarks --out runs/evaluation \\
        --arm biased-world runs/b1 --arm biased-world runs/b2 --arm generated runs/b3 ...

Backbones of one arm differ by their training seed. Everything is kept below --out: run again, it continues.
Writes bench/results/evaluation.{json,md}: of each figure the median and the range over an arm's seeds.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ubgen.benchmark import Table, machine_record
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import write_result
from ubgen.core.stage import MANIFEST
from ubgen.evaluate.datasets import open_transfer
from ubgen.evaluate.results import all_stored
from ubgen.loading.decode import decode
from ubgen.loading.imageset import ImageSet
from ubgen.measures.intervals import bootstrap_mean
from ubgen.measures.probe import search_probe

Figures = dict[str, dict[str, list[float | None]]]  # arm -> figure -> a value for each backbone
FASHION = "fashionmnist"
SEEDS, TRIALS = 2, 20


def evaluate(backbone: str, data: Path, out: Path) -> None:
    command = [sys.executable, "-m", "ubgen.cli.eval"]
    options = ["--backbone", backbone, "--data", str(data), "--out", str(out), "--threads", "1"]
    if backbone.startswith("random:"):
        options += ["--image-size", "64"]
        kinds = ["transfer", "fewshot"]  # it names no classes
    else:
        kinds = ["all"]
    probes = ["--seeds", str(SEEDS), "--trials", str(TRIALS)]
    for kind in kinds:
        subprocess.run([*command, kind, *options, *probes], check=True)
    subprocess.run(
        [*command, "transfer", *options, "--datasets", FASHION, "--seeds", "1", "--trials", str(TRIALS)],
        check=True,
    )


def pixels(data: Path) -> tuple[float, float, float]:
    """Top-1 of the same probe on raw pixels, in percent, with its interval."""
    found = open_transfer(FASHION, data)
    train, test = (_pixels(part) for part in (found.trainval, found.test))
    labels = found.trainval.labels
    fitted, validation = found.split(0)
    search = search_probe(
        train[fitted], labels[fitted], train[validation], labels[validation], trials=TRIALS, seed=0
    )
    value, low, high = bootstrap_mean(search.probe.predict(test) == found.test.labels)
    return 100 * value, 100 * low, 100 * high


def _pixels(images: ImageSet) -> np.ndarray:
    """(N, 784) in [0, 1]: one of the three equal channels."""
    return (
        np.stack([decode(images.read(i))[..., 0].ravel() for i in range(len(images))]).astype(np.float32)
        / 255
    )


def collect(arms: dict[str, list[Path]]) -> Figures:
    found: Figures = defaultdict(lambda: defaultdict(list))
    for arm, outs in arms.items():
        for out in outs:
            for result in all_stored(out):
                for name, figure in result.figures.items():
                    found[arm][f"{result.evaluation} {result.dataset}: {name}"].append(figure.value)
    return found


def table(found: Figures, arms: dict[str, list[Path]]) -> Table:
    columns = ["figure", *(f"{arm} ({len(outs)})" for arm, outs in arms.items())]
    names = list(dict.fromkeys(name for arm in found.values() for name in arm))
    rows: list[Sequence[str]] = [[name, *(_cell(found[arm].get(name, [])) for arm in arms)] for name in names]
    note = "In percent or percentage points: median over the training seeds and their range; in brackets their number."
    return Table("Figures", columns, rows, 1, note)


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return "undefined" if values else ""
    middle = f"{statistics.median(known):.1f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.1f} to {max(known):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", nargs=2, action="append", metavar=("NAME", "BACKBONE"), required=True)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arms: dict[str, list[Path]] = defaultdict(list)
    for arm, backbone in given.arm:
        out = given.out / f"{arm}-{len(arms[arm]) + 1}"
        arms[arm].append(out)
        evaluate(backbone, given.data, out)
        assert (out / MANIFEST).is_file()
    raw = pixels(given.data)
    found = collect(arms)
    cells: list[Sequence[str]] = [["raw pixels", f"{raw[0]:.1f} ({raw[1]:.1f} to {raw[2]:.1f})"]]
    line = Table("FashionMNIST on raw pixels", ["side", "top-1"], cells, 1)
    device = describe(machine_record())
    about = Table(
        "Setting", ["", ""], [["device", device], ["probe", f"{SEEDS} seeds, {TRIALS} trials of C"]], 2
    )
    content = {
        "arms": {arm: dict(values) for arm, values in found.items()},
        "raw pixels": raw,
        "device": device,
    }
    tables = [about, table(found, arms), line]
    write_result(Path("bench/results"), "evaluation", content, tables)


if __name__ == "__main__":
    main()
