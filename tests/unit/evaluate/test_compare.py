"""Differences of two backbones, paired by test image."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from ubgen.core.errors import UserError
from ubgen.evaluate.compare import compare, differences, paired, units
from ubgen.evaluate.jobs import Job, run_jobs
from ubgen.evaluate.results import Figure, Result
from ubgen.evaluate.tables import grids, paper, write_tables
from ubgen.measures.bias import background_gap, context_score, shape_bias


def as_result(dataset: str, columns: Mapping[str, Any], evaluation: str = "transfer") -> Result:
    return Result(
        evaluation, dataset, {"top-1": Figure(100 * float(np.mean(columns["correct"])))}, predictions=columns
    )


def accuracy_columns(correct: np.ndarray, seeds: int = 1) -> dict[str, Any]:
    names = np.array([f"{i:05d}.jpg" for i in range(len(correct))] * seeds)
    values = np.tile(correct, seeds)
    return {
        "sample": names,
        "label": names,
        "predicted": names,
        "correct": values,
        "seed": np.repeat(range(seeds), len(correct)),
    }


def write(out: Path, *results: Result, identity: str = "a") -> Path:
    jobs = [Job(r.evaluation, r.dataset, {}, lambda report, r=r: r) for r in results]  # type: ignore[misc]
    run_jobs(
        jobs,
        out,
        {"identity": identity, "precision": "no"},
        write_tables=lambda out, found: write_tables(out / "results.md", {"x": found}),
    )
    return out


def the_one(result: Result) -> Callable[[], Any]:
    return lambda: next(iter(units(result, result.predictions).values()))  # type: ignore[arg-type]


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(800) < 0.6, rng.random(800) < 0.66
    both = [the_one(as_result("dtd", accuracy_columns(x)))() for x in (a, b)]
    figure, _, count = paired(*both)
    peer = bootstrap(
        (100.0 * (b.astype(float) - a),), np.mean, n_resamples=9999, method="percentile", random_state=0
    )
    assert count == 800
    assert figure.value == pytest.approx(100 * (b.mean() - a.mean()))
    assert figure.low == pytest.approx(peer.confidence_interval.low, abs=0.35)
    assert figure.high == pytest.approx(peer.confidence_interval.high, abs=0.35)


def test_seeds_do_not_count_as_more_images() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.5, rng.random(300) < 0.6
    once, often = (
        paired(*(the_one(as_result("dtd", accuracy_columns(x, seeds)))() for x in (a, b)))[0]
        for seeds in (1, 5)
    )
    assert once == often


def test_a_backbone_against_itself_is_within_noise_and_a_better_one_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.random(500) < 0.5
    better = base | (rng.random(500) < 0.3)
    one = write(
        tmp_path / "one", as_result("dtd", accuracy_columns(base)), as_result("pets", accuracy_columns(base))
    )
    two = write(
        tmp_path / "two",
        as_result("dtd", accuracy_columns(better)),
        as_result("pets", accuracy_columns(better)),
    )
    assert [d.within_noise for d in differences(one, one)] == [True] * 3
    found = differences(one, two)
    assert [d.dataset for d in found] == ["dtd", "pets", "average"]
    assert [d.within_noise for d in found] == [False] * 3
    assert found[2].figure.value == pytest.approx(np.mean([found[0].figure.value, found[1].figure.value]))
    texts = "\n".join(grid.markdown() for grid in compare([one, two]))
    assert ", within noise)" not in texts
    assert ", within noise)" in "\n".join(grid.markdown() for grid in compare([one, one]))
    assert "differences to one" in texts
    assert "IN-RealFake" in texts  # the paper has these datasets


def test_statistics_are_those_of_the_measures() -> None:
    rng = np.random.default_rng(3)
    classes = np.array(["bear", "cat", "dog"])
    n = 400
    shape, texture, said = (classes[rng.integers(0, 3, n)] for _ in range(3))
    names = np.array([f"{i}" for i in range(n)])
    cue = {"sample": names, "label": shape, "texture": texture, "predicted": said, "correct": said == shape}
    k, correct = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05]), rng.random(n) < 0.6
    focus = {"sample": names, "label": shape, "predicted": said, "correct": correct, "uncommon": k}
    same, rand = rng.random(n // 2) < 0.8, rng.random(n // 2) < 0.7
    in9 = {
        "sample": names, "label": shape, "predicted": said, "correct": np.concatenate([same, rand]),
        "variant": np.repeat(["mixed_same", "mixed_rand"], n // 2), "foreground": np.tile(names[: n // 2], 2),
    }  # fmt: skip
    figures = {}
    for dataset, columns in {"cue-conflict": cue, "focus": focus, "in9": in9}.items():
        one = the_one(as_result(dataset, columns, "bias"))()
        figures[dataset] = float(one.statistic(one.sums.sum(0, keepdims=True))[0])
    assert figures["cue-conflict"] == pytest.approx(shape_bias(said, shape, texture).texture_inclination)
    assert figures["focus"] == pytest.approx(context_score(correct, k).cb_avg)
    assert figures["in9"] == pytest.approx(background_gap(same, rand).gap)


def test_an_undefined_figure_stays_undefined() -> None:
    names = np.array(["a", "b", "c"])
    columns = {
        "sample": names,
        "label": names,
        "predicted": names,
        "correct": names == names,
        "uncommon": np.array([0, 1, 2]),
    }
    one = the_one(as_result("focus", columns, "bias"))()
    assert paired(one, one)[0].value is None


def test_fractions_are_compared_one_by_one(tmp_path: Path) -> None:
    parts = [accuracy_columns(np.arange(40) % 4 < m) for m in (1, 3)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns["fraction"] = np.repeat([0.1, 1.0], 40)
    out = write(tmp_path / "one", as_result("dtd", columns, "fewshot"))
    assert [d.dataset for d in differences(out, out)] == ["dtd 100 %", "dtd 10 %"]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", as_result("dtd", accuracy_columns(np.ones(5, bool))))
    columns = accuracy_columns(np.ones(5, bool))
    columns["sample"] = np.array([f"other {i}" for i in range(5)])
    two = write(tmp_path / "two", as_result("dtd", columns))
    with pytest.raises(UserError, match="transfer-dtd: they were evaluated on other test images"):
        compare([one, two])
    with pytest.raises(UserError, match="two or more"):
        compare([one])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is unfinished or not a ubgen eval directory"):
        compare([one, tmp_path / "empty"])


def test_the_papers_rows_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    out = write(tmp_path / "one", as_result("dtd", accuracy_columns(np.ones(5, bool))))
    measured, printed = (out / "results.md").read_text().split("## The paper's figures, not measured here", 1)
    assert "| dtd | 100.0 |" in measured
    assert "IN-ubGen" not in measured
    assert "| ResNet50, IN-ubGen | 72.8 | 73.2 |" in printed
    ours = Result("bias", "in9", {"gap": Figure(5.0)}, details={"mapping": "in9-miniature"})
    assert len(grids({"x": [ours]})) == 2  # the miniature's figures are not beside the paper's
    assert len(grids({"x": [replace(ours, details={"mapping": "in9-imagenet1k"})]})) == 3
    for table in paper().values():
        assert all(set(row["figures"]) == set(table["columns"]) for row in table["rows"])
