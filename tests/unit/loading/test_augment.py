"""The transforms are timm's: in distribution where they are random, pixel for pixel where they are not."""

import random
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.auto_augment
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from ubgen.loading import augment
from ubgen.loading.augment import TrainingTransform
from ubgen.loading.decode import MEAN, STD, EvaluationTransform, decode
from ubgen.loading.settings import Augmentation

PLAIN = Augmentation(flip=0.0, rand_augment="", erasing=0.0)
DRAWS = [pytest.param(2_000), pytest.param(20_000, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """timm draws from the global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def assert_same_distribution(ours: list[float], theirs: list[float]) -> None:
    """Two-sample Kolmogorov-Smirnov, at a level of about 1 in 2,000."""
    a, b = np.sort(ours), np.sort(theirs)
    at = np.concatenate([a, b])
    distance = np.abs(
        np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    ).max()
    assert distance < 2.0 * np.sqrt((len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize("draws", DRAWS)
def test_crops_have_timms_distribution(draws: int) -> None:
    transform = TrainingTransform(64)
    frame = torch.empty(3, 300, 400, device="meta")
    reference = RandomResizedCropAndInterpolation(64)
    ours, theirs = [], []
    for seed in range(draws):
        augment._draws.seed(seed)
        ours.append(transform.box(300, 400))
        theirs.append(reference.get_params(frame, reference.scale, reference.ratio))
    for measure in (
        lambda box: box[2] * box[3] / 120_000,
        lambda box: box[3] / box[2],
        lambda box: box[0] / 300,
        lambda box: box[1] / 400,
    ):
        assert_same_distribution([measure(box) for box in ours], [measure(box) for box in theirs])


def recorded(module: object, draw: Iterator[None]) -> tuple[Counter, dict[str, list[float]]]:
    """How often each operation of RandAugment is applied, and its first argument, while `draw` goes on."""
    counts: Counter = Counter()
    arguments: dict[str, list[float]] = {}
    for operation in next(draw).ops:  # type: ignore[attr-defined]

        def applied(image: object, *values: float, _name: str = operation.name, **_: object) -> object:
            counts[_name] += 1
            arguments.setdefault(_name, []).extend(values[:1])
            return image

        operation.aug_fn = applied
    for _ in draw:
        pass
    return counts, arguments


@pytest.mark.parametrize("draws", DRAWS)
def test_rand_augment_has_timms_frequencies_and_magnitudes(draws: int) -> None:
    image = Image.new("RGB", (8, 8))
    name = Augmentation().rand_augment
    ours = TrainingTransform(224)._augment
    theirs = timm.data.auto_augment.rand_augment_transform(
        name, {"translate_const": 100, "img_mean": (124, 116, 104)}
    )

    def draw_ours() -> Iterator:
        yield ours
        for seed in range(draws):
            augment._draws.seed(seed)
            yield ours(image)

    def draw_theirs() -> Iterator:
        yield theirs
        for _ in range(draws):
            yield theirs(image)

    (counts, arguments), (expected, expected_arguments) = (
        recorded(None, draw_ours()),
        recorded(None, draw_theirs()),
    )
    assert len(counts) == 15
    assert set(counts) == set(expected)
    each = draws * 2 * 0.5 / 15
    assert all(abs(counts[name] - each) < 5 * each**0.5 for name in counts)
    for name, values in expected_arguments.items():
        if values:
            assert_same_distribution(arguments[name], values)


def test_posterize_to_no_bits_is_black() -> None:
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    operations = {op.name: op for op in TrainingTransform(32)._augment.ops}
    posterize = operations["PosterizeIncreasing"].aug_fn
    assert np.asarray(posterize(image, 0, fillcolor=(0, 0, 0))).max() == 0
    assert np.asarray(posterize(image, 1))[0, 0].tolist() == [128, 0, 0]
    assert posterize(image, 8) is image


def test_timms_own_modules_stay_as_they_are() -> None:
    assert timm.data.auto_augment.random is random
    assert timm.data.auto_augment.np is np
    assert timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] is timm.data.auto_augment.posterize


@pytest.mark.parametrize("draws", DRAWS)
def test_erasing_has_timms_rate_area_and_noise(draws: int) -> None:
    ours_eraser = TrainingTransform(32)._erase
    theirs_eraser = RandomErasing(0.25, mode="pixel", max_count=1, num_splits=0, device="cpu")
    areas: tuple[list[float], list[float]] = ([], [])
    noise = []
    for seed in range(draws):
        augment._draws.seed(seed)
        for eraser, found in zip((ours_eraser, theirs_eraser), areas, strict=True):
            pixels = eraser(torch.full((3, 32, 32), 99.0))
            erased = pixels != 99.0
            if erased.any():
                found.append(erased[0].float().mean().item())
                if eraser is ours_eraser:
                    noise.append(pixels[erased])
    spread = 5 * (draws * 0.25 * 0.75) ** 0.5
    assert abs(len(areas[0]) - draws / 4) < spread
    assert_same_distribution(*areas)
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("draws", [pytest.param(300), pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_whole_transform_has_timms_moments(make: SimpleNamespace, draws: int) -> None:
    theirs = create_transform(
        32, is_training=True, auto_augment="rand-m9-n2-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", color_jitter=None,
        interpolation="bicubic",
    )  # fmt: skip
    for operation in theirs.transforms[2].ops:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = augment.posterize  # Pillow 13 raises in timm's
    ours, image = TrainingTransform(32), make.picture(0, 160, 128)
    data = make.encoded(image, "PNG")  # always decoded at full scale
    a = np.stack([ours(data, seed) for seed in range(draws)])
    b = np.stack([theirs(image).numpy() for _ in range(draws)])
    for of in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3))):
        for channel in range(3):
            assert_same_distribution(of(a)[:, channel].tolist(), of(b)[:, channel].tolist())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_timms_pixel_for_pixel(make: SimpleNamespace, interpolation: str) -> None:
    """Within 1e-5 of a normalised value: the rounding of float32."""
    for width, height, size in ((160, 128, 64), (96, 200, 48), (40, 40, 56)):
        data = make.encoded(make.picture(1, width, height))
        settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": interpolation}
        reference = create_transform(size, is_training=False, crop_pct=0.875, **settings)
        expected = reference(Image.open(BytesIO(data)).convert("RGB"))
        assert np.abs(EvaluationTransform(size, **settings)(data) - expected.numpy()).max() < 1e-5
    settings = {"interpolation": "bicubic", "crop_pct": 0.875}  # mean and deviation by default: ImageNet's
    expected = create_transform(size, is_training=False, **settings)(Image.open(BytesIO(data)).convert("RGB"))
    assert np.abs(EvaluationTransform(size)(data) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_without_chance_is_timms_but_for_rounding(seed: int) -> None:
    """At most 2 of 255 levels from Pillow's resize, larger and smaller; on white noise half a level on average.

    There, each clips other overshoots between the two passes of the resize.
    """
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 240, 2)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if seed % 2:
        pixels = np.asarray(
            Image.fromarray(pixels[:9, :11]).resize((width, height), Image.Resampling.BICUBIC)
        )
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    whole = Augmentation(crop_area=(1, 1), crop_aspect=(0.01, 100), flip=0, rand_augment="", erasing=0)
    transform = TrainingTransform(80, whole)
    top, left, height, width = transform.draw(pixels.shape[:2], seed).box
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    expected = np.asarray(crop.resize((80, 80), Image.Resampling.BICUBIC), np.float32)
    levels = transform(buffer.getvalue(), seed) * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))
    difference = np.abs(255 * levels - expected.transpose(2, 0, 1))
    assert difference.max() < 2.01 or seed % 2 == 0
    assert difference.mean() < (0.2 if seed % 2 else 0.5)


def test_a_reduced_scale_shows_the_same_crop(make: SimpleNamespace) -> None:
    """Decoded at a half or a quarter, the crop is the full decode's, within 0.01 of a normalised value on average."""
    smooth = make.picture(4, 32, 24).resize((512, 384), Image.Resampling.BICUBIC)
    data = make.encoded(smooth, quality=95)
    assert decode(data, 96).shape == (96, 128, 3)
    assert decode(data, 200).shape == (384, 512, 3)
    reduced, full = TrainingTransform(48, PLAIN), TrainingTransform(48, PLAIN)
    png = make.encoded(Image.fromarray(decode(data)), "PNG")
    for seed in range(20):
        difference = np.abs(reduced(data, seed) - full(png, seed))
        assert difference.mean() < 0.01


def test_a_reduced_scale_keeps_the_moments(make: SimpleNamespace) -> None:
    """On blocks of noise, the hardest case, contrast is up to 4 % higher; the means are the same."""
    data = make.encoded(make.picture(0, 160, 128), quality=95)
    png = make.encoded(Image.fromarray(decode(data)), "PNG")
    transform = TrainingTransform(32)
    a, b = (np.stack([transform(source, seed) for seed in range(500)]) for source in (data, png))
    assert np.abs(a.mean((0, 2, 3)) - b.mean((0, 2, 3))).max() < 0.01
    assert np.abs(a.std((2, 3)).mean(0) / b.std((2, 3)).mean(0) - 1).max() < 0.04
