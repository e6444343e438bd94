"""What an image shows by itself, as CleanVision and imagehash see it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ubgen.dataset.tools.inspection import bad_images, look, perceptual_hash

cleanvision = pytest.importorskip("cleanvision", reason="CleanVision is not installed")
imagehash = pytest.importorskip("imagehash", reason="imagehash is not installed")

NAMES = {
    "dark": "dark",
    "light": "light",
    "blurry": "blurry",
    "low_information": "low_information",
    "grey": "grayscale",
    "odd_aspect_ratio": "odd_aspect_ratio",
    "odd_size": "odd_size",
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)) for i in range(12)]
    smooth = [image.resize((4, 4)).resize((90, 90), Image.Resampling.BICUBIC) for image in noise[:4]]
    levels = [
        Image.fromarray((np.asarray(noise[0]) // 255 * 10 + level).astype(np.uint8)) for level in (0, 60, 240)
    ]
    flat = [Image.new("RGB", (70, 70), colour) for colour in ((0, 0, 0), (255, 255, 255), (90, 120, 10))]
    shapes = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(shapes).ellipse((20, 20, 90, 90), fill="red")
    ramp = np.repeat(np.arange(128), 32).reshape(64, 64)  # all greys up to the middle, and no edge
    smooth.append(Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)))
    odd = [noise[0].resize((300, 60)), noise[1].resize((900, 900)), noise[2].convert("L"), shapes]
    return [*noise, *smooth, *levels, *flat, *odd]


def test_kinds_of_bad_image(tmp_path) -> None:
    looks, files = [], []
    for i, picture in enumerate(pictures()):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        looks.append(look(buffer.getvalue()))
        files.append(tmp_path / f"{i:02d}.png")
        files[-1].write_bytes(buffer.getvalue())
    lab = cleanvision.Imagelab(filepaths=[str(file) for file in files])
    lab.find_issues({name: {} for name in NAMES.values()}, n_jobs=1, verbose=False)
    scores = lab.issues.loc[[str(file) for file in files]]
    ours = bad_images(looks)
    for name, peers in NAMES.items():
        assert ours[name] == np.flatnonzero(scores[f"is_{peers}_issue"]).tolist(), name
    assert [name for name in NAMES if not ours[name]] == []  # each kind is there
    assert [one.dark for one in looks] == pytest.approx(scores["dark_score"].tolist())
    assert [one.light for one in looks] == pytest.approx(scores["light_score"].tolist())
    assert [one.sharp for one in looks] == pytest.approx(scores["blurry_score"].tolist())
    assert [one.information for one in looks] == pytest.approx(scores["low_information_score"].tolist())


def test_perceptual_hash() -> None:
    for picture in pictures():
        assert f"{perceptual_hash(picture):016x}" == str(imagehash.phash(picture))
