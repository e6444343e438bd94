"""A random network on small image folders, through the real extraction and probe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.curves import draw_curves
from ubgen.evaluate.datasets import TransferData, open_transfer
from ubgen.evaluate.extract import extract
from ubgen.evaluate.fewshot import fewshot
from ubgen.evaluate.results import Result, save, stored
from ubgen.evaluate.settings import FewShotSettings, TransferSettings
from ubgen.evaluate.transfer import transfer
from ubgen.measures.intervals import mean_per_class
from ubgen.measures.probe import fit_linear_probe
from ubgen.measures.splits import few_shot_subset

QUICK = TransferSettings(seeds=2, trials=3)
QUICK_FEW = FewShotSettings(seeds=2, trials=2, fractions=(1.0, 0.5, 0.1))
NAMES = ("blue", "green", "noise", "red")


def silent(done: int, total: int, note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of noisy colours; two of them alike."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    colours = {"red": (170, 80, 80), "green": (80, 170, 80), "blue": (80, 80, 170), "noise": (95, 85, 160)}
    for part, counts in (("train", (20, 12, 9, 20)), ("test", (9, 6, 5, 8))):
        for name, count in zip(NAMES, counts, strict=True):
            (root / "colours" / part / name).mkdir(parents=True)
            for i in range(count):
                colour = rng.normal(colours[name], 30)
                pixels = np.clip(rng.normal(colour, 45, (40, 36, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / "colours" / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("random:resnet18@3", device="cpu", image_size=32)


@pytest.fixture
def data(root: Path) -> TransferData:
    return open_transfer("colours", root)


@pytest.fixture(scope="module")
def done(root: Path, backbone: Backbone) -> Result:
    return transfer(backbone, open_transfer("colours", root), QUICK, report=silent)


def test_accuracies_follow_from_the_stored_predictions(done: Result, data: TransferData) -> None:
    label, predicted, correct, seed = (
        np.array(done.predictions[column]) for column in ("label", "predicted", "correct", "seed")
    )
    assert len(label) == 2 * len(data.test)
    assert (correct == (label == predicted)).all()
    assert done.main.value == pytest.approx(100 * correct.mean())
    by_seed = [100 * mean_per_class(predicted[seed == s], label[seed == s]) for s in (0, 1)]
    assert done.figures["mean per class"].value == pytest.approx(np.mean(by_seed))
    assert [run["mean per class"] for run in done.details["runs"]] == pytest.approx(by_seed)
    for figure in done.figures.values():
        assert figure.low is not None
        assert figure.low < figure.value < figure.high
    for sample, name in zip(done.predictions["sample"], label, strict=True):
        assert sample.split("/")[:2] == ["test", name]


def test_it_learns_what_the_features_tell(done: Result) -> None:
    assert done.main.value > 55  # a constant answer gives 32
    assert done.counts == {"classes": 4, "train": 50, "validation": 11, "test": 28}


def test_the_final_probe_is_fitted_to_train_and_validation_images(
    done: Result, data: TransferData, backbone: Backbone
) -> None:
    x, y = (extract(backbone, part, backbone.transform()) for part in (data.trainval, data.test))
    run = done.details["runs"][1]
    predicted = fit_linear_probe(x, data.trainval.labels, C=run["C"]).predict(y)
    rows = np.array(done.predictions["seed"]) == 1
    assert np.array(NAMES)[predicted].tolist() == np.array(done.predictions["predicted"])[rows].tolist()


def test_the_same_seed_gives_the_same_result_and_the_files_are_listed(
    done: Result, data: TransferData, backbone: Backbone, tmp_path: Path
) -> None:
    again = transfer(backbone, data, QUICK, cache=tmp_path / "cache", report=silent)
    cached = transfer(backbone, data, QUICK, cache=tmp_path / "cache", report=silent)
    for other in (again, cached):
        assert (other.figures, other.details, other.splits) == (done.figures, done.details, done.splits)
    second = transfer(
        backbone, data, replace(QUICK, seed=1, seeds=1), cache=tmp_path / "cache", report=silent
    )
    assert second.details["runs"] == done.details["runs"][1:]
    assert second.splits["val, seed 1"] == done.splits["val, seed 1"] != done.splits["val, seed 0"]
    assert set(done.splits["val, seed 0"]) < set(done.splits["trainval"])
    assert [done.splits["trainval"][0], done.splits["test"][-1]] == ["train/blue/0.png", "test/red/7.png"]


def test_a_result_can_be_stored(done: Result, tmp_path: Path) -> None:
    save(tmp_path, done, {})
    found = stored(tmp_path, done.name)
    assert found is not None
    assert found[0].figures == done.figures


def test_progress_never_goes_back_and_ends_at_its_total(data: TransferData, backbone: Backbone) -> None:
    calls = []

    def report(done: int, total: int, note: str = "") -> None:
        calls.append((done, total))

    transfer(backbone, data, replace(QUICK, trials=1), report=report)
    assert calls == sorted(calls)
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1]


def test_a_broken_image_is_named(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "broken" / part / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "broken" / part / name / f"{i}.png").symlink_to(root / "colours/train/red/0.png")
    bad = tmp_path / "broken" / "test" / "b" / "1.png"
    bad.unlink()
    bad.write_bytes(b"\x89PNG, cut off")
    with pytest.raises(UserError, match=f"{bad}: not a usable image"):
        transfer(backbone, open_transfer("broken", tmp_path), QUICK, report=silent)


def test_one_training_image_of_each_class_leaves_none_to_choose_by(
    root: Path, backbone: Backbone, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "single" / part / name).mkdir(parents=True)
            (tmp_path / "single" / part / name / "0.png").symlink_to(root / "colours/train/red/0.png")
    data = open_transfer("single", tmp_path)
    with pytest.raises(UserError, match="single: no class has two training images"):
        transfer(backbone, data, QUICK, report=silent)


@pytest.fixture(scope="module")
def few(root: Path, backbone: Backbone) -> Result:
    return fewshot(backbone, open_transfer("colours", root), QUICK_FEW, report=silent)


def test_few_shot_has_a_figure_for_each_fraction(few: Result, data: TransferData) -> None:
    assert list(few.figures) == ["top-1 at 100 %", "top-1 at 50 %", "top-1 at 10 %"]
    fraction, correct = (np.array(few.predictions[column]) for column in ("fraction", "correct"))
    assert len(fraction) == 3 * 2 * len(data.test)
    for share, figure in zip(QUICK_FEW.fractions, few.figures.values(), strict=True):
        assert figure.value == pytest.approx(100 * correct[fraction == share].mean())
    sizes = [len(few_shot_subset(data.trainval.labels, share, 0)) for share in QUICK_FEW.fractions]
    assert [few.counts[f"training images at {share} %"] for share in (100, 50, 10)] == sizes == [61, 31, 8]


def test_few_shot_uses_the_listed_subset_and_nothing_else(
    few: Result, data: TransferData, backbone: Backbone
) -> None:
    """Other training images may be anything."""
    names = [data.trainval.keys[i] for i in range(len(data.trainval))]
    subset = [names.index(name) for name in few.splits["10 %, seed 1"]]
    assert subset == few_shot_subset(data.trainval.labels, 0.1, 1).tolist()
    x, y = (extract(backbone, part, backbone.transform()) for part in (data.trainval, data.test))
    run = next(r for r in few.details["runs"] if (r["fraction"], r["seed"]) == (0.1, 1))
    predicted = fit_linear_probe(x[subset], data.trainval.labels[subset], C=run["C"]).predict(y)
    rows = (np.array(few.predictions["fraction"]) == 0.1) & (np.array(few.predictions["seed"]) == 1)
    assert np.array(NAMES)[predicted].tolist() == np.array(few.predictions["predicted"])[rows].tolist()


def test_all_training_images_give_the_figures_of_transfer(
    few: Result, data: TransferData, backbone: Backbone
) -> None:
    whole = transfer(backbone, data, TransferSettings(seeds=2, trials=2), report=silent)
    assert few.figures["top-1 at 100 %"] == whole.main


def test_curves_are_drawn_for_several_backbones_and_datasets(few: Result, tmp_path: Path) -> None:
    other = replace(few, dataset="other")
    draw_curves({"one": [few, other], "two": [few]}, tmp_path / "several.png")
    draw_curves({"one": [few]}, tmp_path / "one.png")
    sizes = [Image.open(tmp_path / name).size for name in ("several.png", "one.png")]
    assert sizes[0][0] > 2 * sizes[1][0]  # two datasets and their mean
    with pytest.raises(UserError, match="no few-shot result"):
        draw_curves({"one": []}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"fractions": (0.5, 0.0)}, "--fractions must be above 0"),
        ({"fractions": ()}, "--fractions must be above 0"),
        ({"fractions": (0.5, 0.5)}, "names one twice"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FewShotSettings(**wrong)  # type: ignore[arg-type]
