import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError
from ubgen.miniature import measure
from ubgen.miniature.card import REQUIRED, spearman
from ubgen.miniature.measure import (
    WEIGHTS,
    Arguments,
    Judge,
    compare,
    entropy,
    generate,
    mutual_information,
    stored_images,
)
from ubgen.miniature.shapes import CLASSES
from ubgen.miniature.world import biased_world, fair_world, render_many


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_mutual_information_and_entropy_by_hand() -> None:
    assert mutual_information(np.eye(4) * 7) == pytest.approx(math.log(4))
    assert mutual_information(np.ones((4, 4))) == pytest.approx(0)
    assert entropy(np.array([5, 5, 0])) == pytest.approx(math.log(2))


def test_spearman_by_hand() -> None:
    import torch

    assert spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(1)
    assert spearman(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(-1)


def test_the_judge_tells_the_biased_world_from_the_fair_one(judge: Judge) -> None:
    fair, factors = render_many(fair_world(classes=tuple(range(10))), 300, seed=50)
    biased, tied = render_many(biased_world(severity_range=(0.0, 0.0)), 300, seed=51)
    free = judge.measure(fair, [CLASSES[f.label] for f in factors])
    bound = judge.measure(biased, [CLASSES[f.label] for f in tied])
    assert free.class_accuracy > 0.93
    assert bound.class_accuracy > 0.93
    assert free.biased_background < 0.25
    assert bound.biased_background > 0.85
    assert bound.mutual_information > free.mutual_information + 1
    assert free.background_entropy == pytest.approx(math.log(8), abs=0.1)


def test_wrong_labels_lower_accuracy_and_similarity(judge: Judge) -> None:
    images, factors = render_many(fair_world(), 100, seed=52)
    right = judge.measure(images, [CLASSES[f.label] for f in factors])
    wrong = judge.measure(images, [CLASSES[(f.label + 1) % 20] for f in factors])
    assert wrong.class_accuracy < 0.1 < right.class_accuracy
    assert wrong.clip_similarity < right.clip_similarity - 0.1


def write_images(root: Path, images: np.ndarray, names: list[str]) -> None:
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name / f"{i}.png")


def test_images_of_a_folder_are_measured_as_they_are(judge: Judge, tmp_path: Path) -> None:
    images, factors = render_many(biased_world(), 20, seed=53)
    names = [CLASSES[f.label] for f in factors]
    write_images(tmp_path / "data", images, names)
    found = compare(Arguments(base=False, dataset=(tmp_path / "data",), out=tmp_path / "out"))
    expected, measured = vars(judge.measure(images, names)), vars(found[str(tmp_path / "data")])
    assert measured == pytest.approx(expected, rel=1e-5), "the order of the images is another"
    assert json.loads((tmp_path / "out/measures.json").read_text())[str(tmp_path / "data")] == measured
    with Image.open(tmp_path / "out/data.png") as sheet:
        assert sheet.width == 64 * len(set(names))


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [("tench", 64, "'tench' is no class of the miniature"), ("disc", 32, "32x32 pixels; expected 64x64")],
)
def test_images_that_are_not_the_miniatures(name: str, size: int, reason: str, tmp_path: Path) -> None:
    write_images(tmp_path, np.zeros((1, size, size, 3), np.uint8), [name])
    with pytest.raises(UserError, match=reason):
        stored_images(tmp_path)


def test_generation_depends_on_identity_and_not_on_the_batch() -> None:
    from ubgen.diffusion import load_stable_diffusion

    sd = load_stable_diffusion(f"{WEIGHTS}/stable-diffusion")
    one, names = generate(sd, ["disc", "ring"], 2, seed=9, steps=4, batch=4)
    other, _ = generate(sd, ["disc", "ring"], 2, seed=9, steps=4, batch=3)
    assert names == ["disc", "ring", "disc", "ring"]
    assert np.abs(one.astype(int) - other).max() <= 1


def test_the_model_card_shows_what_was_required_of_the_family() -> None:
    root = resolve_path(WEIGHTS)
    figures = json.loads(Path(root / "figures.json").read_text())["figures"]
    missed = {name: figures[name] for name, least in REQUIRED.items() if figures[name] < least}
    assert not missed
    assert sum(f.stat().st_size for f in root.rglob("*.safetensors")) <= 16e6


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (Arguments(lora=(Path("/nope"),)), "/nope: no such LoRA file"),
        (Arguments(per_class=0), "--per-class must be at least 1, not 0"),
        (Arguments(batch=-1), "--batch must be at least 1, not -1"),
        (Arguments(base=False), "--no-base leaves nothing to measure"),
    ],
)
def test_a_wrong_call_fails_before_any_sampling(
    monkeypatch: pytest.MonkeyPatch, given: Arguments, line: str
) -> None:
    monkeypatch.setattr(measure, "generate", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(UserError, match=line):
        compare(given)


def test_a_place_that_cannot_be_written_shows_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "generate", lambda *_, **__: pytest.fail("it sampled"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        compare(Arguments(out=tmp_path / "file" / "out"))
