"""Directories of the released shape, whose images are links to one small JPEG, read through torchvision's classes."""

import gzip
import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from ubgen.core.errors import UserError, Warned
from ubgen.evaluate import readers
from ubgen.evaluate.catalogue import DATASETS, PAPER
from ubgen.evaluate.datasets import TransferData, open_datasets, open_transfer, require_datasets
from ubgen.loading.decode import EvaluationTransform
from ubgen.loading.imageset import ImageSet

TABLE_7 = {
    "aircraft": (100, 3334, 3333, 3333),
    "cars": (196, 5700, 2444, 8041),
    "dtd": (47, 1880, 1880, 1880),
    "eurosat": (10, 13500, 5400, 8100),
    "flowers": (102, 1020, 1020, 6149),
    "pets": (37, 2570, 1110, 3669),
    "food101": (101, 68175, 7575, 25250),
    "sun397": (397, 15880, 3970, 19850),
}
EUROSAT = (3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000)


def write_images(paths: Iterable[Path], image: Path) -> None:
    made: set[Path] = set()
    for path in paths:
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        os.symlink(image, path)


def spread(total: int, classes: int) -> list[int]:
    """`total` class numbers, as even as possible, the classes one after the other."""
    return np.sort(np.arange(total) % classes).tolist()


def write_text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def aircraft(root: Path, image: Path, sizes: tuple[int, ...] = (3334, 3333, 3333)) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = [f"Type {i:02d}/A" for i in reversed(range(100))]  # not in the order of the alphabet
    write_text(data / "variants.txt", variants)
    number = 0
    for split, total in zip(("train", "val", "test"), sizes, strict=True):
        names = [(f"{number + i:07d}", variants[c]) for i, c in enumerate(spread(total, 100))]
        number += total
        write_text(data / f"images_variant_{split}.txt", (f"{image_name} {v}" for image_name, v in names))
        write_images((data / "images" / f"{image_name}.jpg" for image_name, _ in names), image)


def cars(root: Path, image: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(
        base / "devkit" / "cars_meta.mat", {"class_names": np.array([f"Car {i}" for i in range(196)], object)}
    )
    for split, total, file in (
        ("train", 8144, "devkit/cars_train_annos.mat"),
        ("test", 8041, "cars_test_annos_withlabels.mat"),
    ):
        rows = [(f"{i:05d}.jpg", c + 1) for i, c in enumerate(spread(total, 196))]
        savemat(base / file, {"annotations": np.array(rows, [("fname", object), ("class", object)])})
        write_images((base / f"cars_{split}" / name for name, _ in rows), image)


def dtd(root: Path, image: Path, size: int = 1880) -> None:
    base = root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        names = [f"texture{c:02d}/{split}_{i:04d}.jpg" for i, c in enumerate(spread(size, 47))]
        write_text(base / "labels" / f"{split}1.txt", names)
        write_images((base / "images" / name for name in names), image)


def eurosat(root: Path, image: Path) -> None:
    base = root / "eurosat" / "2750"
    write_images(
        (base / f"Land{c}" / f"Land{c}_{i}.jpg" for c in range(10) for i in range(EUROSAT[c])), image
    )


def flower_labels() -> tuple[np.ndarray, np.ndarray]:
    """Labels by image number, which are in no order; and the numbers of train, val, test, one after the other."""
    order = np.random.default_rng(0).permutation(8189)
    labels = np.empty(8189, np.int64)
    labels[order] = [*spread(1020, 102), *spread(1020, 102), *spread(6149, 102)]
    return labels, order


def flowers(root: Path, image: Path) -> None:
    base = root / "flowers-102"
    of_image, order = flower_labels()
    write_images((base / "jpg" / f"image_{i + 1:05d}.jpg" for i in range(8189)), image)
    savemat(base / "imagelabels.mat", {"labels": of_image + 1})
    ids = {"trnid": order[:1020] + 1, "valid": order[1020:2040] + 1, "tstid": order[2040:] + 1}
    savemat(base / "setid.mat", ids)


def pets(root: Path, image: Path, sizes: tuple[int, int] = (3680, 3669)) -> None:
    base = root / "oxford-iiit-pet"
    for split, total in zip(("trainval", "test"), sizes, strict=True):
        names = [(f"breed_{c:02d}_{split}{i}", c) for i, c in enumerate(spread(total, 37))]
        write_text(base / "annotations" / f"{split}.txt", (f"{name} {c + 1} 1 1" for name, c in names))
        write_images((base / "images" / f"{name}.jpg" for name, _ in names), image)


def food101(root: Path, image: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, each in (("train", 750), ("test", 250)):
        names = {
            f"dish_{c:03d}": [f"dish_{c:03d}/{split}{i}" for i in range(each)] for c in reversed(range(101))
        }
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
        write_images((base / "images" / f"{n}.jpg" for listed in names.values() for n in listed), image)


def sun397(root: Path, image: Path) -> None:
    base = root / "SUN397"
    places = [f"/p/place_{c:03d}{'/indoor' if c % 5 == 0 else ''}" for c in range(397)]
    write_text(base / "ClassName.txt", places)
    for file, part in (("Training_01.txt", "a"), ("Testing_01.txt", "b")):
        names = [f"{place}/sun_{part}{i:02d}.jpg" for place in places for i in range(50)]
        write_text(base / file, names)
        write_images((base / name[1:] for name in names), image)
    write_images((base / place[1:] / "sun_of_no_partition.jpg" for place in places), image)


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "aircraft": aircraft,
    "cars": cars,
    "dtd": dtd,
    "eurosat": eurosat,
    "flowers": flowers,
    "pets": pets,
    "food101": food101,
    "sun397": sun397,
}
BIG = ("cars", "eurosat", "food101", "sun397")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    Image.new("RGB", (20, 16), (200, 30, 90)).save(path)
    return path


@pytest.fixture(autouse=True)
def any_annotations_of_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares their MD5 sums; ours are other files."""
    files = {key: (name, None) for key, (name, _) in torchvision.datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)


def class_in_path(name: str, data: ImageSet, index: int) -> str:
    """The class that our writers put into the path or the annotations."""
    key = data.keys[index]
    if name in ("dtd", "food101", "eurosat"):
        return key.split("/")[-2]
    if name == "sun397":
        return "/".join(key.split("/")[1:-1])
    if name == "pets":
        return " ".join(key.split("/")[1].split("_")[:2]).title()
    if name == "flowers":
        label = flower_labels()[0][int(Path(key).stem.removeprefix("image_")) - 1]
        return torchvision.datasets.Flowers102.classes[label]
    number = int(Path(key).stem)
    if name == "aircraft":
        sizes = [("train", 3334), ("val", 3333), ("test", 3333)]
        for _, size in sizes:
            if number < size:
                return f"Type {99 - spread(size, 100)[number]:02d}/A"
            number -= size
    return f"Car {spread(8144 if 'train' in key else 8041, 196)[number]}"


def check(name: str, root: Path) -> None:
    classes, train, val, test = TABLE_7[name]
    paper = open_transfer(name, root, splits="paper")
    toolbox = open_transfer(name, root, splits="toolbox")
    assert len(paper.trainval.class_ids) == classes
    for seed in (0, 1):
        fitted, validation = paper.split(seed)
        assert (len(fitted), len(validation), len(paper.test)) == (train, val, test)
        assert sorted([*fitted, *validation]) == list(range(train + val))
        sizes = toolbox.trainval.counts()
        drawn = toolbox.split(seed)[1]
        assert np.bincount(toolbox.trainval.labels[drawn]).tolist() == [size // 5 for size in sizes]
    same_for_all_seeds = paper.split(0)[1].tolist() == paper.split(1)[1].tolist()
    assert same_for_all_seeds == (name in ("aircraft", "dtd", "flowers"))
    if (each := {"eurosat": 540, "pets": 30, "food101": 75, "sun397": 10}.get(name)) is not None:
        assert np.bincount(paper.trainval.labels[paper.split(2)[1]]).tolist() == [each] * classes
    names = [set(paper.file_lists()[part]) for part in ("trainval", "test")]
    assert [len(part) for part in names] == [train + val, test]
    assert not names[0] & names[1]
    assert [set(toolbox.file_lists()[part]) for part in ("trainval", "test")] == names
    assert paper.fingerprint() != toolbox.fingerprint()
    assert paper.fingerprint() == open_transfer(name, root, splits="paper").fingerprint()
    rng = np.random.default_rng(0)
    for data in (paper.trainval, paper.test):
        for index in rng.integers(0, len(data), 40).tolist():
            assert data.read(index)[:2] == b"\xff\xd8"
            assert data.class_ids[data.labels[index]] == class_in_path(name, data, index)


@pytest.mark.parametrize("name", [name for name in PAPER if name not in BIG])
def test_splits_are_those_of_table_7(name: str, tmp_path: Path, image: Path) -> None:
    WRITERS[name](tmp_path, image)
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_splits_of_the_large_datasets_are_those_of_table_7(name: str, tmp_path: Path, image: Path) -> None:
    WRITERS[name](tmp_path, image)
    check(name, tmp_path)


def test_the_catalogue_says_what_table_7_says() -> None:
    assert {name: (DATASETS[name].classes, *DATASETS[name].sizes) for name in PAPER} == TABLE_7


def test_all_missing_datasets_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        open_datasets([*PAPER, "mine", "../up"], tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"10 of 10 datasets below {tmp_path} cannot be used:"
    for name, line in zip(PAPER, lines[1:], strict=False):
        assert line.startswith(f"  {name}: {tmp_path / DATASETS[name].base}")
        assert all(file in line for file in DATASETS[name].files)
        assert DATASETS[name].source in line
    assert f"{tmp_path / 'mine' / 'test'} is missing" in lines[9]
    assert "'../up' is not a dataset" in lines[10]


def test_a_missing_file_is_named(tmp_path: Path, image: Path) -> None:
    dtd(tmp_path, image, 47)
    (tmp_path / "dtd/dtd/labels/val1.txt").unlink()
    with pytest.raises(
        UserError, match=r"dtd: .*labels/val1\.txt is missing; expected dtd/dtd/ with images, "
    ):
        require_datasets(["dtd"], tmp_path)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path, image: Path) -> None:
    pets(tmp_path, image, (74, 37))
    gone = tmp_path / "oxford-iiit-pet/images/breed_00_trainval1.jpg"
    gone.unlink()
    with pytest.raises(UserError, match=rf"pets: .*: 1 of 74 images are missing, the first is {gone}"):
        open_transfer("pets", tmp_path)


def test_damaged_annotations_are_one_line_with_the_layout(tmp_path: Path, image: Path) -> None:
    aircraft(tmp_path, image, (100, 100, 100))
    for directory in ("food-101/images", "stanford_cars/cars_train", "stanford_cars/cars_test"):
        (tmp_path / directory).mkdir(parents=True)
    for file in ("cars_test_annos_withlabels.mat", "devkit/cars_meta.mat"):
        write_text(tmp_path / "stanford_cars" / file, ["not read"])
    (tmp_path / "fgvc-aircraft-2013b/data/images_variant_val.txt").write_text("0000001 No such variant\n")
    (tmp_path / "stanford_cars/devkit/cars_train_annos.mat").write_bytes(b"MATLAB 5.0, cut off")
    write_text(tmp_path / "food-101/meta/train.json", ['{"dish": ["dish/1"'])
    write_text(tmp_path / "food-101/meta/test.json", ["{}"])
    with pytest.raises(UserError) as raised:
        open_datasets(["aircraft", "cars", "food101"], tmp_path)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == 3
    for name, line in zip(("aircraft", "cars", "food101"), lines, strict=True):
        assert line.startswith(
            f"  {name}: {tmp_path / DATASETS[name].base} is damaged, or not what was released ("
        )
        assert f"get it from {DATASETS[name].source}" in line
    assert "No such variant" in lines[0]


def test_other_annotations_of_flowers_are_found_out(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for file in ("imagelabels.mat", "setid.mat"):
        (base / file).write_bytes(b"not the released file")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"flowers: .* is damaged, or not what was released .*corrupted"):
        open_transfer("flowers", tmp_path)


def test_a_class_without_a_training_image_is_named(tmp_path: Path, image: Path) -> None:
    aircraft(tmp_path, image, (100, 100, 100))
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for split in ("train", "val"):
        file = data / f"images_variant_{split}.txt"
        write_text(file, (line for line in file.read_text().splitlines() if "Type 42/A" not in line))
    with pytest.raises(UserError, match="aircraft: class 'Type 42/A' has no training image"):
        open_transfer("aircraft", tmp_path)


def test_a_class_that_only_the_test_images_have_is_named(tmp_path: Path, image: Path) -> None:
    dtd(tmp_path, image, 47)
    labels = tmp_path / "dtd" / "dtd" / "labels"
    for split in ("train", "val"):
        file = labels / f"{split}1.txt"
        write_text(file, (line for line in file.read_text().splitlines() if "texture07" not in line))
    with pytest.raises(
        UserError, match="class 'texture07' of the test images is not among the training images"
    ):
        open_transfer("dtd", tmp_path)


def test_other_sizes_than_the_released_ones(tmp_path: Path, image: Path) -> None:
    dtd(tmp_path, image, 94)
    file = tmp_path / "dtd/dtd/labels/test1.txt"
    write_text(file, file.read_text().splitlines()[:-1])
    with pytest.raises(UserError, match=r"94 / 94 / 93 images .* released are 47 and 1,880 / 1,880 / 1,880"):
        open_transfer("dtd", tmp_path, splits="paper")
    with pytest.warns(Warned, match="141 / 47 / 93 images"):
        assert len(open_transfer("dtd", tmp_path).test) == 93


def test_a_partition_of_sun397_names_images_that_are_there(tmp_path: Path, image: Path) -> None:
    base = tmp_path / "SUN397"
    write_text(base / "ClassName.txt", ["/a/abbey"])
    write_images([base / "a/abbey/sun_1.jpg"], image)
    write_text(base / "Training_01.txt", ["/a/abbey/sun_1.jpg"])
    write_text(base / "Testing_01.txt", ["/a/abbey/sun_2.jpg"])
    with pytest.raises(
        UserError, match=r"sun397: .*sun_2\.jpg: no such image, but the first partition names it"
    ):
        open_transfer("sun397", tmp_path)


def folder(root: Path, image: Path, **parts: dict[str, int]) -> Path:
    write_images(
        (
            root / part / name / f"{i}.jpg"
            for part, classes in parts.items()
            for name, n in classes.items()
            for i in range(n)
        ),
        image,
    )
    return root


def test_any_image_folder(tmp_path: Path, image: Path) -> None:
    folder(tmp_path / "mine", image, train={"b": 6, "a": 11}, test={"a": 2, "b": 3})
    data = open_transfer("mine", tmp_path)
    assert data.trainval.class_ids == data.test.class_ids == ("a", "b")
    assert data.trainval.counts().tolist() == [11, 6]
    assert data.trainval.keys[0] == "train/a/0.jpg"
    assert data.trainval.read(0) == image.read_bytes()
    assert np.bincount(data.trainval.labels[data.split(0)[1]]).tolist() == [2, 1]


def test_the_validation_images_of_an_image_folder_belong_to_the_papers_split(
    tmp_path: Path, image: Path
) -> None:
    folder(tmp_path / "mine", image, train={"a": 8, "b": 8}, val={"a": 2, "b": 1}, test={"a": 2, "b": 3})
    paper, toolbox = (open_transfer("mine", tmp_path, splits=splits) for splits in ("paper", "toolbox"))
    assert [paper.trainval.keys[i] for i in paper.split(0)[1]] == [
        "val/a/0.jpg",
        "val/a/1.jpg",
        "val/b/0.jpg",
    ]
    assert np.bincount(toolbox.trainval.labels[toolbox.split(0)[1]]).tolist() == [2, 1]
    assert {toolbox.trainval.keys[i].split("/")[0] for seed in range(5) for i in toolbox.split(seed)[1]} == {
        "train",
        "val",
    }


def test_classes_of_an_image_folder_have_to_match(tmp_path: Path, image: Path) -> None:
    folder(tmp_path / "mine", image, train={"a": 8, "b": 8}, test={"a": 2, "c": 3})
    with pytest.raises(UserError, match=r"class 'c' of .*mine/test is not in .*mine/train"):
        open_transfer("mine", tmp_path)


def write_idx(path: Path, array: np.ndarray, packed: bool = False) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.gz" if packed else path).write_bytes(gzip.compress(data) if packed else data)


def fashion(raw: Path, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 28, 28), np.uint8), np.arange(60) % 10
    for part, chosen in (("train", slice(0, 40)), ("t10k", slice(40, 60))):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[chosen], packed)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[chosen], packed)
    return images, labels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_in_torchvisions_and_debians_form(
    packed: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "system" if packed else tmp_path / "FashionMNIST" / "raw"
    images, labels = fashion(directory, packed)
    monkeypatch.setattr(readers, "SYSTEM_FASHION_MNIST", directory)
    monkeypatch.setitem(DATASETS, "fashionmnist", replace(DATASETS["fashionmnist"], elsewhere=directory))
    with pytest.warns(Warned, match="60,000|48,000"):
        data = open_transfer("fashionmnist", tmp_path)
    assert data.trainval.labels.tolist() == labels[:40].tolist()
    assert data.trainval.class_ids[9] == "Ankle boot"
    for part, first in ((data.trainval, 0), (data.test, 40)):
        for index in (0, len(part) - 1):
            shown = EvaluationTransform(28, 1.0)(part.read(index))
            expected = (images[first + index] / 255 - 0.485) / 0.229
            np.testing.assert_allclose(shown[0], expected, atol=1e-5)
    if not packed:
        theirs = torchvision.datasets.FashionMNIST(str(tmp_path), train=False)
        assert theirs.targets.tolist() == data.test.labels.tolist()
        assert theirs.classes == list(data.test.class_ids)


def test_a_cut_fashion_mnist_is_refused(tmp_path: Path, cache: Path) -> None:
    fashion(tmp_path / "FashionMNIST" / "raw")
    file = tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"fashionmnist: .*t10k-images-idx3-ubyte: not a whole file of MNIST's format"
    ):
        open_transfer("fashionmnist", tmp_path)


def test_digits(tmp_path: Path, cache: Path) -> None:
    from sklearn.datasets import load_digits

    data = open_transfer("digits", tmp_path, splits="paper")
    names = [*data.file_lists()["trainval"], *data.file_lists()["test"]]
    assert len(set(names)) == 1797
    assert data.test.counts().tolist() == [50] * 10
    truth = load_digits()
    index = int(data.test.keys[7].rpartition("/")[2])
    assert data.test.labels[7] == truth.target[index]
    shown = EvaluationTransform(8, 1.0)(data.test.read(7))[0] * 0.229 + 0.485
    np.testing.assert_allclose(shown * 16, truth.images[index], atol=0.05)


def test_the_cached_images_are_written_once_and_again_when_they_are_damaged(
    tmp_path: Path, cache: Path
) -> None:
    open_transfer("digits", tmp_path)
    (file,) = (cache / "ubgen" / "images").iterdir()
    content, before = file.read_bytes(), file.stat().st_mtime_ns
    open_transfer("digits", tmp_path)
    assert file.stat().st_mtime_ns == before
    file.write_bytes(content[:-1] + b"\x07")
    open_transfer("digits", tmp_path)
    assert file.read_bytes() == content


@pytest.mark.filterwarnings("ignore::ubgen.core.errors.Warned")
@pytest.mark.parametrize("name", ["aircraft", "dtd", "pets"])
def test_the_data_may_be_in_the_current_directory(
    name: str, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"aircraft": (100, 100, 100), "dtd": 47, "pets": (74, 37)}[name]
    WRITERS[name](tmp_path, image, small)  # type: ignore[call-arg]
    monkeypatch.chdir(tmp_path)
    here, there = (open_transfer(name, root) for root in (Path("."), tmp_path))
    assert here.file_lists() == there.file_lists()
    assert here.test.read(0) == image.read_bytes()


def test_nothing_is_downloaded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(root: Path, download: bool) -> readers.Parts:
        asked.append(download)
        raise UserError("no network here")

    for name in ("dtd", "cars"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], read=read))
    with pytest.raises(UserError, match="is missing"):
        open_transfer("dtd", tmp_path)
    with pytest.raises(UserError, match="no network here"):
        open_transfer("dtd", tmp_path, download=True)
    with pytest.raises(UserError, match=r"cars: .*is missing.*--download cannot"):
        open_transfer("cars", tmp_path, download=True)
    assert asked == [True]


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--splits must be toolbox or paper"):
        open_transfer("dtd", tmp_path, splits="table")  # type: ignore[arg-type]


def test_the_split_is_a_function_of_the_seed(tmp_path: Path, image: Path) -> None:
    folder(tmp_path / "mine", image, train={"a": 40, "b": 8}, test={"a": 2, "b": 3})
    data: TransferData = open_transfer("mine", tmp_path)
    assert [data.split(seed)[1].tolist() for seed in (5, 5)] == [data.split(5)[1].tolist()] * 2
    assert len({tuple(data.split(seed)[1]) for seed in range(6)}) > 1
