"""The paper's Tables 1, 3 and 4 and the points of Figure 4, their differences, and what became of its claims."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import FEW_SHOT, MEAN, RISE, Estimate, Values, arm_estimates, by_arm, difference
from plan import ARMS, MAIN, MODELS, Run

from ubgen.benchmark import Table

TITLES = {"resnet": "small ResNet", "vit": "small ViT"}
REAL_VALIDATION, FAIR_VALIDATION = "val: val-biased", "val: val-fair"
TEXTURE, CONTEXT, BACKGROUND = "bias: cue-conflict", "bias: focus", "bias: in9"
BIAS = {TEXTURE: "texture inclination", CONTEXT: "CB_avg", BACKGROUND: "background gap"}
ABLATION = ("real", "base", "eq8", "no-entire", "no-individual", "no-quality", "recommended")
_NOTE = "In percent (background gap: points): mean over the runs; 95 % intervals over test images, then over seeds. "
ORACLE = (
    "class_accuracy",
    "clip_similarity",
    "quality",
    "biased_background",
    "mutual_information",
    "background_entropy",
    "within_class_variance",
)
"""Measures of a dataset."""


@dataclass(frozen=True)
class Claim:
    """A difference of the paper: an arm less another has the sign."""

    text: str
    source: str
    figure: str
    arm: str
    against: str
    sign: int
    models: Sequence[str] = tuple(MODELS)


def claims() -> Iterator[Claim]:
    """Those of PROTOCOL.md, in its order."""
    for arm in ("eq8", "recommended"):
        yield Claim("transfers better than base", "Table 1", MEAN, arm, "base", +1)
        yield Claim("transfers better than real", "Table 1", MEAN, arm, "real", +1)
        yield Claim("real is better on its own validation", "Table 1", REAL_VALIDATION, arm, "real", -1)
        for against in ("base", "real"):
            yield Claim(f"less texture than {against}", "Table 3", TEXTURE, arm, against, -1)
            yield Claim(f"less context than {against}", "Table 3", CONTEXT, arm, against, +1)
            yield Claim(f"less background than {against}", "Table 3", BACKGROUND, arm, against, -1)
        yield Claim("gains more with few images", "Figure 4", RISE, arm, "base", +1)
    for term in ("entire", "individual", "quality"):
        yield Claim(
            f"without the {term} term transfer falls", "Table 4", MEAN, f"no-{term}", "eq8", -1, ("resnet",)
        )
    yield Claim(
        "without the individual term validation falls", "Table 4", REAL_VALIDATION, "no-individual", "eq8", -1,
        ("resnet",),
    )  # fmt: skip


def all_tables(found: Mapping[str, Values], runs: Sequence[Run], out: Path) -> list[Table]:
    """Every table of the page. `found` are the figures of `runs`, `out` the directory of `make reproduce`."""
    made = [claims_table(found, runs), datasets_table(runs, out)]
    tasks = [name for name in found if name.startswith("transfer: ") and name != MEAN]
    table_1 = [REAL_VALIDATION, FAIR_VALIDATION, *tasks, MEAN]
    shares = sorted(
        (name for name in found if name.startswith(FEW_SHOT)),
        key=lambda name: -float(name.split()[-2]) if name != RISE else 1.0,
    )
    for title, figures, arms, models in (
        ("Table 1: transfer", table_1, MAIN, tuple(MODELS)),
        ("Table 3: bias", list(BIAS), MAIN, tuple(MODELS)),
        ("Table 4: the terms of the loss", table_1 + list(BIAS), ABLATION, ("resnet",)),
        ("Figure 4: few training images", [*shares, RISE] if RISE in found else shares, MAIN, tuple(MODELS)),
    ):
        for model in models:
            if by_arm(runs, model):
                made += _pair(f"{title}, {TITLES[model]}", figures, arms, model, found, runs)
    return made


def _pair(
    title: str,
    figures: Sequence[str],
    arms: Sequence[str],
    model: str,
    found: Mapping[str, Values],
    runs: Sequence[Run],
) -> tuple[Table, Table]:
    """The figures of each arm, and their differences to the base arm."""
    there = [arm for arm in arms if arm in by_arm(runs, model)]
    figures = list(dict.fromkeys(name for name in figures if name in found))
    own = {name: arm_estimates(found[name], runs, model) for name in figures}
    counts = {arm: own[figures[0]][arm].runs for arm in there}
    heads = [f"{arm} ({count})" for arm, count in counts.items()]
    rows: list[Sequence[str]] = [[shown(name), *(own[name][arm].text() for arm in there)] for name in figures]
    others = [arm for arm in there if arm != "base"]
    less: list[Sequence[str]] = [
        [shown(name), *(_text(difference(found[name], runs, model, arm, "base")) for arm in others)]
        for name in figures
    ]
    return (
        Table(title, ["figure", *heads], rows, 1, f"{_NOTE}In brackets above: runs."),
        Table(f"{title}: differences to base", ["figure", *others], less, 1, f"{_NOTE}Paired."),
    )


def _text(made: Estimate | None) -> str:
    return made.text(sign=True) if made else ""


def shown(name: str) -> str:
    """A figure's name for people."""
    return BIAS.get(name, name.removeprefix("transfer: ").removeprefix("val: "))


def claims_table(found: Mapping[str, Values], runs: Sequence[Run]) -> Table:
    """Each claim with its difference and verdict."""
    rows: list[Sequence[str]] = []
    for claim in claims():
        for model in claim.models:
            made = difference(found[claim.figure], runs, model, claim.arm, claim.against)
            if made:
                rows.append(
                    (
                        claim.text,
                        claim.source,
                        claim.arm,
                        TITLES[model],
                        made.text(sign=True),
                        made.verdict(claim.sign),
                    )
                )
    words = [row[-1] for row in rows]
    total = ", ".join(f"{words.count(word)} {word}" for word in ("holds", "contradicted", "cannot be told"))
    note = f"The claims were fixed before the first run (PROTOCOL.md): {total}."
    columns = ["claim", "from", "arm", "network", "difference", "verdict"]
    return Table("What became of the paper's claims", columns, rows, 6, note)


def datasets_table(runs: Sequence[Run], out: Path) -> Table:
    """Bias, diversity and quality of each arm's datasets: mean, and lowest to highest fine-tuning seed."""
    rows: dict[str, list[str]] = {name: [] for name in ORACLE}
    arms = [arm for arm in ARMS if any(run.arm == arm for run in runs)]
    for arm in arms:
        names = dict.fromkeys(run.dataset for run in runs if run.arm == arm)
        measured = [
            next(iter(json.loads((out / "measured" / name / "measures.json").read_text()).values()))
            for name in names
        ]
        for measure, row in rows.items():
            values = [one[measure] for one in measured]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.3f}{spread}")
    cells: list[Sequence[str]] = [[name.replace("_", " "), *row] for name, row in rows.items()]
    note = "By the oracle, CLIP and Q-Align of the miniature: mean over fine-tuning seeds, lowest to highest."
    return Table("The datasets", ["measure", *arms], cells, 1, note)
