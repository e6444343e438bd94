import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ubgen.pretrain
from ubgen.core.errors import UserError
from ubgen.loading.decode import BrokenSample, decode
from ubgen.loading.imageset import open_image_set
from ubgen.loading.loader import batches_by_threads, resolve
from ubgen.pretrain import Augmentation, training_batches


def all_keys(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def test_batches_have_their_form(shards: Path) -> None:
    batches = list(training_batches(shards, batch_size=8, image_size=32))
    assert [len(batch["keys"]) for batch in batches] == [8, 8, 4]
    for batch in batches:
        assert batch["images"].shape == (len(batch["keys"]), 3, 32, 32)
        assert batch["images"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].tolist() == [int(key) % 3 for key in batch["keys"]]
    assert not hasattr(ubgen.pretrain, "anything_else")


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 25])
def test_every_sample_comes_once_in_an_epoch(shards: Path, ranks: int) -> None:
    data = open_image_set(shards)
    for epoch in (0, 1):
        keys = Counter(
            key
            for rank in range(ranks)
            for key in all_keys(
                list(
                    training_batches(
                        data, batch_size=3, image_size=8, epoch=epoch, rank=rank, ranks=ranks, augment=False
                    )
                )
            )
        )
        assert keys == Counter(f"{i:09d}" for i in range(20))


def images_by_key(batches: list[dict]) -> dict[str, torch.Tensor]:
    return {
        key: image for batch in batches for key, image in zip(batch["keys"], batch["images"], strict=True)
    }


def test_an_image_depends_on_seed_epoch_and_sample_alone(shards: Path) -> None:
    def images(**options: int) -> dict[str, torch.Tensor]:
        random.seed(options.get("threads", 9))  # nothing global counts
        np.random.seed(options.get("threads", 9))
        torch.manual_seed(options.get("threads", 9))
        return images_by_key(list(training_batches(shards, image_size=24, **{"batch_size": 5, **options})))

    first = images(threads=1)
    for others in (images(threads=4), images(batch_size=3), images(rank=1, ranks=2)):
        assert all(torch.equal(first[key], image) for key, image in others.items())
    for others in (images(epoch=1), images(seed=1)):
        assert not any(torch.equal(first[key], image) for key, image in others.items())


def test_an_epoch_goes_on_in_the_middle(shards: Path) -> None:
    whole = list(training_batches(shards, batch_size=4, image_size=16))
    rest = list(training_batches(shards, batch_size=4, image_size=16, start=2))
    assert all_keys(rest) == all_keys(whole[2:])
    assert torch.equal(rest[0]["images"], whole[2]["images"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"image_size": 0}, "image_size"),
        ({"rank": 1}, "rank"),
        ({"loader": "fast"}, "loader"),
        ({"augmentation": Augmentation(rand_augment="rand-x5")}, "rand_augment"),
    ],
)
def test_wrong_options_are_refused(shards: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(training_batches(shards, **{"batch_size": 4, "image_size": 16, **options}))


GOOD = ("grey.jpg", "cmyk.jpg", "palette.png", "grey16.png", "rgba.png", "rotated.jpg")
BAD = ("truncated.jpg", "empty.jpg", "text.jpg", "truncated.png")


@pytest.fixture(scope="module")
def odd(make: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class of images that can be used, one with those that cannot, between good ones."""
    root = tmp_path_factory.mktemp("odd")
    image = make.picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    grey16 = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    jpeg, png = make.encoded(image), make.encoded(image, "PNG")
    files = {
        "grey.jpg": make.encoded(image.convert("L")),
        "cmyk.jpg": make.encoded(image.convert("CMYK")),
        "palette.png": make.encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "grey16.png": make.encoded(grey16, "PNG"),
        "rgba.png": make.encoded(image.convert("RGBA"), "PNG"),
        "rotated.jpg": make.encoded(image, exif=exif),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "truncated.png": png[: len(png) // 2],
    }
    for folder, names in (("good", GOOD), ("mixed", ("grey.jpg", *BAD))):
        (root / folder).mkdir()
        for name in names:
            (root / folder / name).write_bytes(files[name])
    return root


def test_unusual_images_are_read_as_what_they_show(make: SimpleNamespace, odd: Path) -> None:
    image = np.asarray(make.picture(3)).astype(int)
    grey = np.asarray(make.picture(3).convert("L")).astype(int)[..., None]
    found = {name: decode((odd / "good" / name).read_bytes()).astype(int) for name in GOOD}
    assert all(pixels.ndim == 3 and pixels.shape[2] == 3 for pixels in found.values())
    assert np.abs(found["rgba.png"] - image).max() == 0
    assert np.abs(found["grey16.png"] - grey).max() == 0
    assert np.abs(found["grey.jpg"] - grey).mean() < 4  # of JPEG
    assert np.abs(found["cmyk.jpg"] - image).mean() < 12
    assert np.abs(found["palette.png"] - image).mean() < 12
    assert np.abs(found["rotated.jpg"] - np.rot90(image, -1)).mean() < 12


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_read_is_an_error_that_names_it(odd: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / name).write_bytes((odd / "mixed" / name).read_bytes())
    for augment in (True, False):
        with pytest.raises(BrokenSample, match=f"{name}: not a usable image"):
            list(training_batches(tmp_path, batch_size=2, image_size=16, augment=augment))


def test_broken_images_are_left_out_and_counted(odd: Path) -> None:
    skipped: list[BrokenSample] = []
    batches = list(training_batches(odd, batch_size=4, image_size=16, on_broken=skipped.append))
    assert sorted(all_keys(batches)) == sorted(["mixed/grey.jpg", *(f"good/{name}" for name in GOOD)])
    assert len(skipped) == len(BAD)
    assert all(any(name in str(error) for error in skipped) for name in BAD)
    assert sum(len(batch["images"]) for batch in batches) == 7


def test_a_shard_that_got_shorter_is_an_error_and_not_a_hang(make: SimpleNamespace, tmp_path: Path) -> None:
    root = make.shards(tmp_path, [6])
    data = open_image_set(root)
    tar = root / "shard-000000.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    with pytest.raises(BrokenSample, match=r"shard-000000\.tar: sample 00000000"):
        list(training_batches(data, batch_size=2, image_size=16))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("Allocation on device"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_a_lack_of_memory_is_not_a_broken_image(shards: Path, error: Exception) -> None:
    def transform(data: bytes, seed: int) -> np.ndarray:
        raise error

    data, skipped = open_image_set(shards), []
    with pytest.raises(type(error)):
        next(batches_by_threads(data, np.arange(4), transform, 4, lambda i: i, 1, skipped.append))
    assert not skipped


def test_the_loader_stops_when_it_is_left(shards: Path) -> None:
    batches = training_batches(shards, batch_size=1, image_size=16, threads=2)
    next(batches)
    batches.close()
    assert list(batches) == []


def test_the_processor_of_several_processes_is_a_processor(shards: Path) -> None:
    (first, *_) = training_batches(shards, batch_size=4, image_size=16, device="cpu:0")
    assert first["images"].device.type == "cpu"
    assert resolve("auto", "cpu") == "threads"
