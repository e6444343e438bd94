"""The page of the fine-tuning experiment, from whatever runs are finished."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[3] / "bench/ablation.py"
GOOD = {
    "images": 400,
    "clip_similarity": 0.43,
    "class_accuracy": 0.9,
    "quality": 2.6,
    "biased_background": 0.4,
    "mutual_information": 0.8,
    "background_entropy": 2.0,
    "within_class_variance": 0.25,
}
BASE = GOOD | {"biased_background": 0.9, "mutual_information": 1.6, "quality": 2.5}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablation", module)
    spec.loader.exec_module(module)
    return module


def measured(work: Path, arm: str, seed: int, measures: dict) -> None:
    directory = work / "measured" / f"{arm}-{seed}"
    directory.mkdir(parents=True)
    (directory / "measures.json").write_text(json.dumps({"runs/somewhere": measures}))
    Image.new("RGB", (8, 8)).save(directory / f"{arm}-{seed}.png")


def finish_the_choice(script: ModuleType, work: Path, **figures: dict) -> None:
    """Of each candidate the given figures, else the base's."""
    measured(work, "choice-base", 0, BASE)
    for seed in (1, 2):
        for name in script.CANDIDATES:
            measured(work, f"choice-{name}", seed, BASE | figures.get(name, {}))


def test_seeds_are_the_outer_loop_and_the_base_is_measured_once(script: ModuleType, tmp_path: Path) -> None:
    given = script.Arguments(work=tmp_path, seeds=(11, 12))
    assert [(t.name, t.seed) for t in script.choice(given)][:3] == [
        ("choice-base", 0),
        ("choice-a", 1),
        ("choice-b", 1),
    ]
    assert [t.name for t in script.final(given)][:3] == ["base", "eq8", "eq8-no-entire"], "nothing is chosen"
    finish_the_choice(script, tmp_path)
    plan = script.final(given)
    assert [(t.name, t.seed) for t in plan][:3] == [("base", 0), ("eq8", 11), ("recommended", 11)]
    assert [(t.name, t.seed) for t in plan][7] == ("eq8", 12)
    assert len(plan) == 13


def test_the_lowest_mutual_information_is_taken_of_what_keeps_the_rest(
    script: ModuleType, tmp_path: Path
) -> None:
    lower, lowest = {"mutual_information": 1.2}, {"mutual_information": 0.5}
    finish_the_choice(script, tmp_path / "1", b=lower, c=lowest)
    assert script.chosen(script.Arguments(work=tmp_path / "1")) == "c"
    finish_the_choice(script, tmp_path / "2", b=lower, c=lowest | {"class_accuracy": 0.87})
    assert script.chosen(script.Arguments(work=tmp_path / "2")) == "b"
    wrong = {name: BASE | {"quality": 2.0 + place / 10} for place, name in enumerate(script.CANDIDATES)}
    finish_the_choice(script, tmp_path / "3", **wrong)
    assert script.chosen(script.Arguments(work=tmp_path / "3")) == list(script.CANDIDATES)[-1], "misses least"


def test_the_page_has_the_median_the_range_and_every_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    finish_the_choice(script, work, b={"mutual_information": 1.2})
    measured(work, "base", 0, BASE)
    for seed, information in ((11, 0.8), (12, 1.2), (13, 0.7)):
        measured(work, "recommended", seed, GOOD | {"mutual_information": information})
    out.mkdir()
    (out / "fine-tuning.md").write_text("old tables\n## Reading\n\nBy hand.\n")
    monkeypatch.setattr(sys, "argv", ["ablation", "--report", "--work", str(work), "--out", str(out)])
    script.main()
    page = (out / "fine-tuning.md").read_text()
    assert "**4 of 31 final runs are** measured" in page
    assert "| mutual information | 1.600 | 0.800 (0.700 to 1.200) |" in page
    assert "| mutual information, change | 0.000 | -0.500 (-0.562 to -0.250) |" in page
    assert "| runs that reach all that was hoped for | 0 | 2 |" in page
    assert "| recommended | 12 | 0.430 | 0.900 | 2.600 | 0.400 | 1.200 | 2.000 | 0.250 |" in page
    assert "Taken by the protocol's rule: **b**." in page
    assert "| choice-b | 2 | 0.430 | 0.900 | 2.500 | 0.900 | 1.200 |" in page
    assert page.endswith("## Reading\n\nBy hand.\n")
    assert "old tables" not in page
    assert {path.name for path in out.glob("*.png")} == {
        "fine-tuning-base.png",
        "fine-tuning-recommended.png",
    }
    record = json.loads((out / "fine-tuning.json").read_text())
    assert record["final"]["recommended-12"]["mutual_information"] == 1.2


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("mutual_information", 1.0),
        ("class_accuracy", 0.89),
        ("quality", 2.4),
        ("background_entropy", 1.6),
        ("within_class_variance", 0.2),
    ],
)
def test_what_was_hoped_for_is_all_of_it(script: ModuleType, name: str, worse: float) -> None:
    assert script.reached(BASE, GOOD)
    assert not script.reached(BASE, GOOD | {name: worse})


def test_every_arm_is_a_valid_recipe(script: ModuleType) -> None:
    from ubgen.cli.train import parse
    from ubgen.train.config import validate

    losses = {}
    every = script.arms(script.CANDIDATES["a"])
    every |= {name: ("miniature", options) for name, options in script.CANDIDATES.items()}
    for arm, (recipe, options) in every.items():
        changes = [f"--{name}={value}" for name, value in options.items()]
        config = parse(["--recipe", recipe, *changes]).config
        validate(config)
        losses[arm] = config.losses
    assert (losses["eq8"].entire, losses["eq8"].individual, losses["eq8"].quality) == (1, 1, 0.1)
    assert not losses["eq8"].class_level
    assert losses["recommended"].class_level
    assert losses["recommended"].entire == 0
    for term in ("entire", "individual", "quality"):
        assert getattr(losses[f"eq8-no-{term}"], term) == 0
