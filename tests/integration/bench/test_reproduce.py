"""`make reproduce`: what is run in which order, and the statistics of its page."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from ubgen.core.errors import UserError
from ubgen.evaluate.results import Figure, Result, save

SCRIPTS = Path(__file__).resolve().parents[3] / "bench/reproduce"
NAMES = ("plan", "work", "figures", "tables", "page")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = SimpleNamespace(**{name: __import__(name) for name in NAMES})
    yield found
    for name in NAMES:
        sys.modules.pop(name)


def test_the_protocol_is_what_is_run(scripts: SimpleNamespace, tmp_path: Path) -> None:
    runs = scripts.plan.runs(scripts.plan.SIZES["whole"])
    assert len(runs) == len({run.name for run in runs}) == 17 * 3 + 8 * 3
    jobs = scripts.plan.jobs(scripts.plan.SIZES["whole"], tmp_path)
    kinds = [job.kind for job in jobs]
    assert {kind: kinds.count(kind) for kind in ("train", "dataset", "measure", "backbone", "eval")} == {
        "train": 15, "dataset": 16, "measure": 17, "backbone": 75, "eval": 75,
    }  # fmt: skip
    seeds = {job.name: job.work[job.work.index("--seed") + 1] for job in jobs if job.kind == "train"}
    assert sorted(set(seeds.values())) == ["11", "12", "13"]
    assert [job.block for job in jobs] == sorted(job.block for job in jobs)
    made: set[Path] = set()
    for job in jobs:
        assert set(job.needs) <= made, f"{job.name} comes before what it needs"
        made.add(job.made)


def test_the_terms_of_each_arm(scripts: SimpleNamespace, tmp_path: Path) -> None:
    from ubgen.cli.train import parse

    left_out = {}
    for job in scripts.plan.jobs(scripts.plan.SIZES["small"], tmp_path):
        if job.kind == "train":
            losses = parse([str(part) for part in job.work[1:]]).config.losses
            terms = ("entire", "individual", "quality", "class_mean")
            left_out[job.made.parent.name] = [term for term in terms if getattr(losses, term) == 0]
    assert left_out == {
        "eq8-1": ["class_mean"],
        "recommended-1": ["entire"],
        "no-entire-1": ["entire", "class_mean"],
        "no-individual-1": ["individual", "class_mean"],
        "no-quality-1": ["quality", "class_mean"],
    }


@pytest.mark.slow
def test_every_command_knows_its_options(scripts: SimpleNamespace, tmp_path: Path) -> None:
    called = {}
    for job in scripts.plan.jobs(scripts.plan.SIZES["small"], tmp_path):
        if not callable(job.work):
            words = [str(word) for word in job.work]
            first = next(i for i, word in enumerate(words) if word.startswith("--"))
            command = tuple(word for word in words[:first] if not word.startswith(str(tmp_path)))
            called.setdefault(command, set()).update(word for word in words if word.startswith("--"))
    assert len(called) == 8
    for command, options in called.items():
        said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        assert not {option for option in options if option.replace("--no-", "--") not in said}, command


def crew(scripts: SimpleNamespace, jobs: list, out: Path, workers: int = 2) -> object:
    out.mkdir(exist_ok=True)
    return scripts.work.Crew(jobs, out, workers, 1.0, Console(file=(out / "said").open("a")))


def job(scripts: SimpleNamespace, out: Path, name: str, *needs: str, code: str = "") -> object:
    made = out / name
    script = code or f"open({str(made)!r}, 'w').close(); open({str(out / 'order')!r}, 'a').write({name!r})"
    command = (sys.executable, "-c", script)
    return scripts.plan.Job("train", name, made, command, tuple(out / need for need in needs))


def test_jobs_wait_for_what_they_need_and_finished_ones_stay(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    jobs = [
        job(scripts, tmp_path, "c", "a", "b"),
        job(scripts, tmp_path, "a"),
        job(scripts, tmp_path, "b", "a"),
    ]
    seen = []
    crew(scripts, jobs, tmp_path).work(lambda: seen.append(sum(one.done for one in jobs)))
    assert (tmp_path / "order").read_text() == "abc"
    assert seen == [1, 2, 3]
    crew(scripts, jobs, tmp_path).work(lambda: pytest.fail("all was finished"))
    assert (tmp_path / "order").read_text() == "abc"
    assert set(json.loads((tmp_path / "times.json").read_text())) == {"a", "b", "c"}


def test_a_failure_ends_the_run_with_its_last_line(scripts: SimpleNamespace, tmp_path: Path) -> None:
    broken = job(scripts, tmp_path, "b", code="raise SystemExit('no space for b')")
    jobs = [broken, job(scripts, tmp_path, "c", "b")]
    with pytest.raises(UserError, match=r"b failed: no space for b \(.*b\.log\)"):
        crew(scripts, jobs, tmp_path).work(lambda: None)
    assert not (tmp_path / "c").exists()


def evaluate(out: Path, skill: float, seed: int) -> None:
    """One backbone's results of two tasks, few-shot shares and a validation set, on the same 400 images."""
    rng = np.random.default_rng(seed)
    images, hard = np.arange(400), np.random.default_rng(0).random(400)

    def correct(extra: float = 0.0) -> np.ndarray:
        return hard < skill + extra + rng.normal(0, 0.02)

    def columns(right: np.ndarray, **more: np.ndarray) -> dict:
        names = [f"{i:03}" for i in images]
        return {"sample": names, "label": [0] * 400, "predicted": [0] * 400, "correct": right, **more}

    results = [
        Result("transfer", f"novel-{i}", {"top-1": Figure(50.0)}, predictions=columns(correct()))
        for i in (1, 2)
    ]
    results.append(Result("val", "val-biased", {"top-1": Figure(50.0)}, predictions=columns(correct())))
    parts = [(share, correct(gain)) for share, gain in ((1.0, 0.0), (0.1, -0.2))]
    few = {
        name: np.concatenate(
            [np.array(columns(right, fraction=np.full(400, share))[name]) for share, right in parts]
        )
        for name in (*columns(parts[0][1]), "fraction")
    }
    details = {
        "runs": [{"fraction": share, "seed": 0, "top-1": 100 * right.mean()} for share, right in parts]
    }
    results.append(Result("fewshot", "novel-1", {"top-1": Figure(50.0)}, details=details, predictions=few))
    for result in results:
        save(out, result, {})


@pytest.fixture
def measured(scripts: SimpleNamespace, tmp_path: Path) -> list:
    """`recommended` is 20 points better than base, `eq8` is as good."""
    skill = {"real": 0.5, "base": 0.5, "eq8": 0.5, "recommended": 0.7}
    every = scripts.plan.runs(scripts.plan.SIZES["whole"])
    runs = [run for run in every if run.arm in skill and run.model == "resnet"]
    for number, run in enumerate(runs):
        evaluate(tmp_path / "eval" / run.name, skill[run.arm], number + 1)
    return runs


def test_a_difference_of_twenty_points_holds_and_none_cannot_be_told(
    scripts: SimpleNamespace, measured: list, tmp_path: Path
) -> None:
    figures = scripts.figures
    found = figures.collect(measured, tmp_path / "eval")
    assert {figures.MEAN, figures.RISE, "few-shot: mean at 10 %"} <= set(found)
    better = figures.difference(found[figures.MEAN], measured, "resnet", "recommended", "base")
    assert better.value == pytest.approx(20, abs=4)
    assert better.runs == 9
    assert better.images[0] < better.value < better.images[1]
    assert better.seeds[0] < better.value < better.seeds[1]
    assert better.verdict(+1) == "holds"
    assert better.verdict(-1) == "contradicted"
    same = figures.difference(found[figures.MEAN], measured, "resnet", "eq8", "base")
    assert same.verdict(+1) == same.verdict(-1) == "cannot be told"
    assert figures.difference(found[figures.MEAN], measured, "vit", "eq8", "base") is None


def test_one_seed_tells_nothing(scripts: SimpleNamespace, measured: list, tmp_path: Path) -> None:
    runs = [run for run in measured if run.block == 1]
    found = scripts.figures.collect(runs, tmp_path / "eval")
    better = scripts.figures.difference(found[scripts.figures.MEAN], runs, "resnet", "recommended", "base")
    assert better.seeds is None
    assert better.verdict(+1) == "cannot be told"


def test_the_interval_over_seeds_is_students_t_of_the_wider_grouping(scripts: SimpleNamespace) -> None:
    runs = [
        scripts.plan.Run("eq8", tuning, "resnet", training) for tuning in (1, 2, 3) for training in (1, 2, 3)
    ]
    value = np.array([10.0, 10, 10, 12, 12, 12, 14, 14, 14])  # differ by fine-tuning seed only
    low, high = scripts.figures.over_seeds(value, runs)
    assert (low + high) / 2 == pytest.approx(12)
    assert high - 12 == pytest.approx(4.3027 * 2 / np.sqrt(3), rel=1e-4)


def test_runs_on_other_images_are_refused(scripts: SimpleNamespace, measured: list, tmp_path: Path) -> None:
    odd = tmp_path / "eval" / measured[-1].name
    result = Result(
        "transfer", "novel-1", {"top-1": Figure(50.0)},
        predictions={"sample": ["x"], "label": [0], "predicted": [0], "correct": [True]},
    )  # fmt: skip
    save(odd, result, {})
    with pytest.raises(UserError, match=r"transfer-novel-1: .* other images"):
        scripts.figures.collect(measured, tmp_path / "eval")


def test_the_claims_are_those_of_the_protocol(scripts: SimpleNamespace) -> None:
    claims = list(scripts.tables.claims())
    assert sum(len(claim.models) for claim in claims) == 44
    text = (SCRIPTS / "PROTOCOL.md").read_text()
    assert "44 comparisons" in text
    assert len(scripts.tables.ORACLE) == 7
