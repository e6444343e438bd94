"""Features over sets of images: the same as one by one, cached, continued, shared, and never NaN."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.evaluate import extract as module
from ubgen.evaluate.backbone import Backbone, load_backbone
from ubgen.evaluate.extract import extract
from ubgen.loading.decode import EvaluationTransform, decode
from ubgen.loading.imageset import ImageSet, open_image_set


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("random:test_resnet", image_size=32, device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(11):
            pixels = np.random.default_rng([ord(label), i]).integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i:02}.png")
    return open_image_set(tmp_path / "data")


@dataclass
class Counting:
    """The real transform; counts the images that it is asked for."""

    inner: EvaluationTransform
    calls = 0

    def __call__(self, data: bytes, seed: int) -> np.ndarray:
        Counting.calls += 1
        return self.inner(data, seed)


@pytest.fixture
def counting(backbone: Backbone) -> Counting:
    Counting.calls = 0
    return Counting(backbone.transform())


def computed(counting: Counting) -> int:
    """How many images were decoded since the last question."""
    count, Counting.calls = counting.calls, 0
    return count


def test_rows_are_the_features_of_each_image_in_order(backbone: Backbone, images: ImageSet) -> None:
    told: list[tuple[int, int]] = []
    rows = extract(
        backbone,
        images,
        backbone.transform(),
        batch_size=5,
        report=lambda done, total, note="": told.append((done, total)),
    )
    assert rows.shape == (22, backbone.dim)
    assert rows.dtype == np.float32
    for i in (0, 7, 21):
        # the protocol, by Pillow alone: shorter side to the input size, bicubic, centre crop, mean and deviation
        image = Image.fromarray(decode(images.read(i))).resize((40, 32), Image.Resampling.BICUBIC)
        pixels = np.asarray(image.crop((4, 0, 36, 32)), np.float32) / 255
        batch = torch.from_numpy((pixels - np.float32(backbone.mean)) / np.float32(backbone.std))
        expected = backbone.features(batch.permute(2, 0, 1)[None]).numpy()[0]
        assert np.abs(rows[i] - expected).max() < 1e-4 * np.abs(expected).max()
    assert told[0] == (0, 22)
    assert told[-1] == (22, 22)


def test_the_cache_answers_without_the_images(
    backbone: Backbone, images: ImageSet, counting: Counting, tmp_path: Path
) -> None:
    first = extract(backbone, images, counting, cache=tmp_path / "cache")
    assert computed(counting) == 22
    other_labels = replace(images, labels=images.labels[::-1].copy())
    assert np.array_equal(extract(backbone, other_labels, counting, cache=tmp_path / "cache"), first)
    assert computed(counting) == 0


def test_anything_that_counts_makes_it_anew(
    backbone: Backbone, images: ImageSet, counting: Counting, tmp_path: Path
) -> None:
    def count(backbone: Backbone, images: ImageSet, transform: Counting) -> int:
        extract(backbone, images, transform, cache=tmp_path / "cache")
        return computed(counting)

    assert count(backbone, images, counting) == 22
    assert count(load_backbone("random:test_resnet@1", image_size=32), images, counting) == 22
    assert count(backbone, images, Counting(backbone.transform(0.875))) == 22
    path = tmp_path / "data" / "a" / "03.png"
    path.write_bytes(path.read_bytes())  # written again: its content may be another
    assert count(backbone, open_image_set(tmp_path / "data"), counting) == 22
    path.unlink()
    assert count(backbone, open_image_set(tmp_path / "data"), counting) == 21
    assert count(backbone, open_image_set(tmp_path / "data"), counting) == 0


def test_an_image_of_another_split_is_not_mistaken(
    backbone: Backbone, images: ImageSet, counting: Counting, tmp_path: Path
) -> None:
    """Names like "a","b1" and "ab","1" run together without a separator."""
    for label, name in (("p", "q1.png"), ("pq", "1.png")):
        (tmp_path / "other" / label).mkdir(parents=True)
        Image.new("RGB", (40, 40), (len(label) * 90, 0, 0)).save(tmp_path / "other" / label / name)
    pair = open_image_set(tmp_path / "other")
    rows = extract(backbone, pair, counting, cache=tmp_path / "cache")
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


@pytest.mark.parametrize("size", [4, 6])
def test_a_killed_extraction_goes_on_with_the_same_bits(
    backbone: Backbone,
    images: ImageSet,
    counting: Counting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    monkeypatch.setattr(module, "PART", 8)
    whole = extract(backbone, images, counting, cache=tmp_path / "whole", batch_size=size)
    computed(counting)

    def stop(done: int, total: int, note: str = "") -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(backbone, images, counting, cache=tmp_path / "cut", batch_size=size, report=stop)
    computed(counting)
    told: list[int] = []
    rows = extract(
        backbone,
        images,
        counting,
        cache=tmp_path / "cut",
        batch_size=size,
        report=lambda done, total, note="": told.append(done),
    )
    assert np.array_equal(rows, whole)
    assert computed(counting) == 14  # the first part, of 8, was kept
    assert told[0] == 8


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_part_is_computed_again(
    backbone: Backbone,
    images: ImageSet,
    counting: Counting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    monkeypatch.setattr(module, "PART", 8)
    whole = extract(backbone, images, counting, cache=tmp_path / "cache")
    computed(counting)
    parts = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(parts) == 3
    data = bytearray(parts[1].read_bytes())
    if damage == "flip":
        data[-40] ^= 1
    changed = {"cut": data[:-5], "flip": data, "empty": b"", "other": parts[2].read_bytes()}[damage]
    parts[1].write_bytes(changed)
    with pytest.warns(UserWarning, match=r"damaged cache file .* computed again"):
        rows = extract(backbone, images, counting, cache=tmp_path / "cache")
    assert np.array_equal(rows, whole)
    assert computed(counting) == 8
    assert np.array_equal(extract(backbone, images, counting, cache=tmp_path / "cache"), whole)
    assert computed(counting) == 0


def test_two_threads_may_share_a_cache(
    backbone: Backbone, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 4)
    whole = extract(backbone, images, backbone.transform(), batch_size=2)

    def call(_: int) -> np.ndarray:
        return extract(backbone, images, backbone.transform(), cache=tmp_path / "cache", batch_size=2)

    with ThreadPoolExecutor(3) as pool:
        assert all(np.array_equal(rows, whole) for rows in pool.map(call, range(3)))
    assert np.array_equal(call(0), whole)


@pytest.mark.slow
def test_two_processes_may_share_a_cache(backbone: Backbone, images: ImageSet, tmp_path: Path) -> None:
    program = """
import sys
import numpy as np
from pathlib import Path
from ubgen.evaluate import extract as module
from ubgen.evaluate.backbone import load_backbone
from ubgen.loading.imageset import open_image_set
module.PART = 4
root = Path(sys.argv[1])
backbone = load_backbone("random:test_resnet", image_size=32, device="cpu")
rows = module.extract(backbone, open_image_set(root / "data"), backbone.transform(), cache=root / "cache", batch_size=2)
np.save(root / f"{sys.argv[2]}.npy", rows)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in ("one", "two")]
    for process in both:
        assert process.wait(120) == 0, process.communicate()[1]
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert np.array_equal(one, two)
    assert np.abs(one - extract(backbone, images, backbone.transform())).max() < 1e-5
    files = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert files == [f"{start:09d}.safetensors" for start in range(0, 22, 4)]


def test_nan_names_the_image(backbone: Backbone, images: ImageSet, tmp_path: Path) -> None:
    @dataclass
    class Poisoned:
        inner: EvaluationTransform

        def __call__(self, data: bytes, seed: int) -> np.ndarray:
            pixels = self.inner(data, seed)
            return pixels * np.nan if seed == 13 else pixels

    with pytest.raises(UserError, match=r"data/b/02\.png: backbone random test_resnet .* NaN or infinity"):
        extract(backbone, images, Poisoned(backbone.transform()), cache=tmp_path / "cache", batch_size=4)


def test_a_broken_image_is_named(backbone: Backbone, images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "data" / "b" / "04.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"data/b/04\.png: not a usable image"):
        extract(backbone, images, backbone.transform(), cache=tmp_path / "cache")


def test_logits_need_a_classifier_and_a_transform_must_be_told_apart(
    backbone: Backbone, images: ImageSet, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no classifier"):
        extract(backbone, images, backbone.transform(), kind="logits")
    with pytest.raises(UserError, match="needs a repr"):
        extract(backbone, images, lambda data, seed: data, cache=tmp_path / "cache")
