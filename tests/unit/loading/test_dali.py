"""DALI's loader: the threads' samples, order and draws; its operations are Pillow's within stated tolerances."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from ubgen.core.errors import UserError
from ubgen.core.probes import dali
from ubgen.loading.augment import TrainingTransform
from ubgen.loading.decode import BrokenSample, Draw, EvaluationTransform, normalised
from ubgen.loading.imageset import open_image_set
from ubgen.loading.loader import batches_by_threads
from ubgen.pretrain import Augmentation, training_batches

if not dali().available:
    pytest.skip(dali().detail, allow_module_level=True)
from ubgen.loading.dali import batches_by_dali


@pytest.mark.parametrize(
    ("augment", "augmentation"),
    [
        (False, None),
        (True, Augmentation(rand_augment="", erasing=0.0)),
        (True, Augmentation(rand_augment="")),
    ],
)
def test_the_same_images_come_as_from_the_threads(
    shards: Path, augment: bool, augmentation: Augmentation | None
) -> None:
    """Decoding, cubic resize, crop, flip and erasing: 99.9 % within 5 grey levels, the mean within 0.3."""
    options = {"batch_size": 8, "image_size": 48, "augment": augment, "augmentation": augmentation}
    ours = list(training_batches(shards, loader="threads", **options))
    theirs = list(training_batches(shards, loader="dali", **options))
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["keys"] == other["keys"]
        assert torch.equal(one["labels"], other["labels"])
        assert other["images"].dtype == torch.float32
        difference = (one["images"] - other["images"]).abs()
        assert difference.mean() < 0.005
        assert difference.quantile(0.999) < 0.09


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_with_other_settings(shards: Path, interpolation: str) -> None:
    """As above, in grey levels of its own deviation."""
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": interpolation}
    transform, data = EvaluationTransform(40, 1.0, **settings), open_image_set(shards)
    arguments = (data, np.arange(12), transform, 12, lambda index: index, 1)
    (one,), (other,) = list(batches_by_threads(*arguments)), list(batches_by_dali(*arguments))
    difference = (one["images"] - other["images"]).abs() * torch.tensor(settings["std"])[:, None, None]
    assert difference.mean() < 0.3 / 255
    assert difference.quantile(0.999) < 5 / 255


class Fixed(TrainingTransform):
    """The whole image, and one operation."""

    def __init__(self, size: int, name: str, value: float) -> None:
        super().__init__(size)
        self.operation = (name, value)

    def draw(self, size: tuple[int, int], seed: int) -> Draw:
        return Draw((0, 0, *size), (self.size, self.size), False, (self.operation,))


VALUES = {
    "AutoContrast": (0.0,), "Equalize": (0.0,), "Invert": (0.0,), "Rotate": (27.0, -27.0), "ShearX": (0.27, -0.27),
    "PosterizeIncreasing": (0.0, 1.0, 3.0), "SolarizeIncreasing": (0.0, 26.0, 256.0), "SolarizeAdd": (99.0,),
    "ColorIncreasing": (0.2, 1.8), "ContrastIncreasing": (0.2, 1.8), "BrightnessIncreasing": (0.2, 1.8),
    "SharpnessIncreasing": (0.2, 1.8), "ShearY": (0.27, -0.27), "TranslateXRel": (0.4, -0.4),
    "TranslateYRel": (0.4, -0.4),
}  # fmt: skip
LOOSE = {
    "Equalize": 6.0,
    "Rotate": 4.0,
    "ShearX": 4.0,
    "ShearY": 4.0,
    "TranslateXRel": 4.0,
    "TranslateYRel": 4.0,
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in VALUES.items() for v in values])
def test_an_operation_is_timms(make: SimpleNamespace, tmp_path: Path, name: str, value: float) -> None:
    """In grey levels, on average: 1; 4 where DALI interpolates linearly, timm cubically; 6 for OpenCV's Equalize."""
    image = make.picture(6, 32, 32).resize((64, 64), Image.Resampling.BICUBIC)
    if name in ("AutoContrast", "Equalize"):
        image = image.point(lambda level: 60 + level // 3)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")
    data = open_image_set(tmp_path)
    (batch,) = batches_by_dali(data, np.arange(1), Fixed(64, name, value), 1, int, 1)
    operation = auto_augment.NAME_TO_OP[name]
    if name.startswith("Posterize"):
        expected = Image.new("RGB", (64, 64)) if value == 0 else operation(image, int(value))
    elif name.startswith("Solarize"):
        expected = operation(image, int(value))
    elif name in ("AutoContrast", "Equalize", "Invert"):
        expected = operation(image)
    else:
        expected = operation(image, value, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    difference = np.abs(batch["images"][0].numpy() - normalised(expected)) * 255 * 0.225
    assert difference.mean() < LOOSE.get(name, 1.0)


def test_what_is_given_to_dali_is_what_the_threads_do(make: SimpleNamespace) -> None:
    """`draw` and `__call__` take the same numbers in the same order."""
    transform = TrainingTransform(32)
    image = make.picture(1)
    applied = Counter[str]()
    for operation in transform._augment.ops:
        operation.aug_fn = lambda image, *values, _name=operation.name, **_: applied.update([_name]) or image
    data = make.encoded(image, "PNG")
    for seed in range(100):
        applied.clear()
        pixels = transform(data, seed)
        draw = transform.draw((image.height, image.width), seed)
        assert Counter(name for name, _ in draw.operations) == applied
        if draw.erased is not None:
            top, left, noise = draw.erased
            there = pixels[:, top : top + noise.shape[1], left : left + noise.shape[2]]
            assert np.array_equal(there, noise.numpy())


def test_every_sample_once_and_the_middle_of_an_epoch(shards: Path) -> None:
    options = {"image_size": 16, "loader": "dali", "batch_size": 3}
    random.seed(1)
    ranks = [list(training_batches(shards, rank=rank, ranks=2, **options)) for rank in range(2)]
    keys = Counter(key for batches in ranks for batch in batches for key in batch["keys"])
    assert keys == Counter(f"{i:09d}" for i in range(20))
    (rest, *_) = training_batches(shards, rank=1, ranks=2, start=2, **options)
    assert rest["keys"] == ranks[1][2]["keys"]
    assert torch.equal(rest["images"], ranks[1][2]["images"])


def test_broken_and_unusual_images(make: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    jpeg = make.encoded(make.picture(2))
    (tmp_path / "a" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "a" / "grey.jpg").write_bytes(make.encoded(make.picture(2).convert("L")))
    (tmp_path / "a" / "cmyk.jpg").write_bytes(make.encoded(make.picture(2).convert("CMYK")))
    (tmp_path / "a" / "some.png").write_bytes(make.encoded(make.picture(2).convert("P"), "PNG"))
    options = {"image_size": 32, "batch_size": 2, "augment": False}
    with pytest.raises(BrokenSample, match=r"cut\.jpg: not a usable image"):
        list(training_batches(tmp_path, loader="dali", **options))
    skipped: list[BrokenSample] = []
    batches = list(training_batches(tmp_path, loader="dali", on_broken=skipped.append, **options))
    reference = list(training_batches(tmp_path, loader="threads", on_broken=lambda _: None, **options))
    assert len(skipped) == 1
    for one, other in zip(batches, reference, strict=True):
        assert one["keys"] == other["keys"]
        assert (one["images"] - other["images"]).abs().mean() < 0.01


def test_operations_that_dali_lacks_are_refused(shards: Path) -> None:
    other = Augmentation(rand_augment="rand-m9-mstd0.5")
    with pytest.raises(UserError, match="--loader dali has no"):
        next(training_batches(shards, loader="dali", batch_size=2, image_size=16, augmentation=other))
