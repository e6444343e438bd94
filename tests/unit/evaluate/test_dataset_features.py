"""Features by CLIP are those of its own way through the same pixels, in a file that knows its images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.dataset.tools.features import note_path, read_features
from ubgen.evaluate.dataset_features import compute_features
from ubgen.loading.imageset import open_image_set
from ubgen.rewards.clip import Clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, write_transformers_clip: Callable[..., Path]) -> Path:
    return write_transformers_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def silent(done: int, total: int, note: str = "") -> None:
    pass


def test_features_are_clips_own(tmp_path: Path, folder: Path, clip: Path) -> None:
    out = tmp_path / "f.npy"
    note = compute_features(str(folder), out, clip=clip, device="cpu", report=silent)
    rows, read = read_features(out)
    assert read == note
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f.json",
        "f.npy",
        "images",
    ]  # no cache is left
    images = open_image_set(folder)
    whole = Clip.load(clip)
    pixels = [np.asarray(Image.open(folder / images.keys[i])) for i in range(len(images))]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.normalize(whole.encode_image(batch), dim=1).detach().numpy()
    assert rows.dtype == np.float16
    np.testing.assert_allclose(np.asarray(rows, np.float32), expected, atol=6e-4)  # half a unit of float16


def test_a_timm_network(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "f.npy"
    note = compute_features(str(folder), out, encoder="random:resnet10t", device="cpu", report=silent)
    assert (note.images, note.dim) == (6, 512)
    assert np.linalg.norm(np.asarray(read_features(out)[0], np.float64), axis=1) == pytest.approx(1, abs=2e-3)


def test_of_other_images(tmp_path: Path, folder: Path, clip: Path) -> None:
    out = tmp_path / "f.npy"
    note = compute_features(str(folder), out, clip=clip, device="cpu", report=silent)
    images = open_image_set(folder)
    note.require(out, images.fingerprint(), len(images), folder)
    Image.new("RGB", (20, 20)).save(folder / "a" / "0.png")
    with pytest.raises(UserError, match="whose images or labels are not those of"):
        note.require(out, open_image_set(folder).fingerprint(), 6, folder)
    with pytest.raises(UserError, match=r"features of 6 images .* has 7"):
        note.require(out, "", 7, folder)


def test_damaged_files(tmp_path: Path, folder: Path, clip: Path) -> None:
    out = tmp_path / "f.npy"
    compute_features(str(folder), out, clip=clip, device="cpu", report=silent)
    note = note_path(out)
    content = json.loads(note.read_bytes())
    note.write_text(json.dumps({**content, "dim": 99}))
    with pytest.raises(UserError, match="says 6 x 99 numbers"):
        read_features(out)
    note.write_text(json.dumps({**content, "dim": "24"}))
    with pytest.raises(UserError, match="is damaged"):
        read_features(out)
    note.unlink()
    with pytest.raises(UserError, match="which says of which images"):
        read_features(out)


@pytest.mark.parametrize("given", [{}, {"clip": Path("c"), "encoder": "random:resnet10t"}])
def test_one_encoder_is_needed(tmp_path: Path, folder: Path, given: dict) -> None:
    with pytest.raises(UserError, match="give one of --clip DIR and --encoder"):
        compute_features(str(folder), tmp_path / "f.npy", report=silent, **given)
