"""Lists of images and labels of the transfer datasets, from their released files.

torchvision's dataset classes read the annotations; with `loader=str` a sample is the path of its image, and no image is
opened.
"""

import gzip
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.core.errors import UserError
from ubgen.core.files import LocalStore, atomic_write, cache_directory
from ubgen.loading.imageset import ImageSet, Strings, matched, open_image_set

Sample = tuple[str, str]
"""Path of an image, and its class."""
SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist keeps the files."""
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


Parts = dict[str, ImageSet]
"""What a dataset's files say: "train" and "val", or both as "trainval"; and "test". Or only "all": nothing is fixed."""


def aircraft(root: Path, download: bool) -> Parts:
    """The released lists of variants: train, val, test."""
    from torchvision.datasets import FGVCAircraft

    return _three(FGVCAircraft, root, root / "fgvc-aircraft-2013b", download)


def cars(root: Path, download: bool) -> Parts:
    """train (as trainval) and test. torchvision needs scipy for the annotations and cannot download."""
    from torchvision.datasets import StanfordCars

    data = {
        part: StanfordCars(root, split, loader=str, download=download)
        for part, split in (("trainval", "train"), ("test", "test"))
    }
    return _parts(
        root / "stanford_cars", {part: (found.classes, _samples(found)) for part, found in data.items()}
    )


def dtd(root: Path, download: bool) -> Parts:
    """The first of the ten released splits."""
    from torchvision.datasets import DTD

    return _three(DTD, root, root / "dtd" / "dtd", download)


def eurosat(root: Path, download: bool) -> Parts:
    """All RGB images; no split was released."""
    from torchvision.datasets import EuroSAT

    found = EuroSAT(root, loader=str, download=download)
    return _parts(root / "eurosat" / "2750", {"all": (found.classes, sorted(_samples(found)))})


def flowers(root: Path, download: bool) -> Parts:
    """The released train, val and test. torchvision needs scipy for the annotations."""
    from torchvision.datasets import Flowers102

    return _three(Flowers102, root, root / "flowers-102", download)


def pets(root: Path, download: bool) -> Parts:
    """The released trainval and test."""
    from torchvision.datasets import OxfordIIITPet

    data = {split: OxfordIIITPet(root, split, download=download) for split in ("trainval", "test")}
    base = root / "oxford-iiit-pet"
    # the one class of torchvision that takes no `loader`
    lists = {
        split: (
            found.classes,
            [
                (str(path), found.classes[label])
                for path, label in zip(found._images, found._labels, strict=True)
            ],
        )
        for split, found in data.items()
    }
    return _parts(base, lists)


def food101(root: Path, download: bool) -> Parts:
    """The released train (as trainval) and test."""
    from torchvision.datasets import Food101

    data = {
        part: Food101(root, split, loader=str, download=download)
        for part, split in (("trainval", "train"), ("test", "test"))
    }
    return _parts(root / "food-101", {part: (found.classes, _samples(found)) for part, found in data.items()})


def sun397(root: Path, download: bool) -> Parts:
    """The first of the ten released partitions. torchvision lists all images, and knows no partition."""
    from torchvision.datasets import SUN397

    found = SUN397(root, loader=str, download=download)
    base = root / "SUN397"
    of_path = dict(_samples(found))
    lists = {}
    for part, file in (("trainval", base / "Training_01.txt"), ("test", base / "Testing_01.txt")):
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        lists[part] = found.classes, [_of_partition(line, base, of_path) for line in lines if line]
    return _parts(base, lists)


def _of_partition(line: str, base: Path, of_path: dict[str, str]) -> Sample:
    path = str(base / line.lstrip("/"))
    if path not in of_path:
        raise UserError(f"{path}: no such image, but the first partition names it")
    return path, of_path[path]


def fashion_mnist(root: Path, download: bool) -> Parts:
    """The released train (as trainval) and test: from below `root`, or from Debian's package."""
    directory = root / "FashionMNIST" / "raw"
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)
    if not directory.is_dir():
        directory = SYSTEM_FASHION_MNIST
    sets = {}
    for part, name in (("trainval", "train"), ("test", "t10k")):
        images = _idx(directory, f"{name}-images-idx3-ubyte", 3)
        labels = _idx(directory, f"{name}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(_FASHION):
            raise UserError(f"{directory}: the images and labels of {name} do not fit each other")
        sets[part] = array_set(images, labels, _FASHION, f"fashionmnist-{part}")
    return sets


def _idx(directory: Path, name: str, dimensions: int) -> np.ndarray:
    """An array in the format of MNIST's files: two zeros, type 8 (bytes), number of dimensions, sizes, data."""
    path = directory / name
    data = path.read_bytes() if path.exists() else gzip.decompress((directory / f"{name}.gz").read_bytes())
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(data[4:start], ">u4")
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + np.prod(sizes, dtype=np.int64):
        raise UserError(f"{path}: not a whole file of MNIST's format")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def digits(root: Path, download: bool) -> Parts:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, which come with the package; no split was released."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return {"all": array_set(images, found.target, [str(i) for i in range(10)], "digits")}


def array_set(images_NHW: np.ndarray, labels_N: np.ndarray, classes: Sequence[str], name: str) -> ImageSet:
    """Grey images (uint8) as an ImageSet: a file of PGM images one after the other, in the cache directory.

    The file's name has the hash of its content. It is written once, and again where its content is not that.
    """
    count, height, width = images_NHW.shape
    header = f"P5 {width} {height} 255\n".encode()
    size = len(header) + height * width
    rows = np.empty((count, size), np.uint8)
    rows[:, : len(header)] = np.frombuffer(header, np.uint8)
    rows[:, len(header) :] = images_NHW.reshape(count, -1)
    content = rows.tobytes()
    digest = hashlib.sha256(content).hexdigest()
    file = f"{name}-{digest[:16]}.pgm"
    store = LocalStore(cache_directory("images"))
    if store.size(file) != len(content) or hashlib.sha256(store.read(file)).hexdigest() != digest:
        atomic_write(store.local_path / file, content)
    starts = np.arange(count, dtype=np.int64) * size
    places = np.column_stack([np.zeros(count, np.int64), starts, np.full(count, size, np.int64)])
    keys = Strings(f"{name}/{i:05d}" for i in range(count))
    return ImageSet(store, "tars", tuple(classes), labels_N.astype(np.int32), keys, (file,), places, digest)


def image_folder(directory: Path) -> Parts:
    """train/, test/ and perhaps val/, each with one directory for each class."""
    present = [part for part in ("train", "val", "test") if (directory / part).is_dir()]
    found = {part: open_image_set(directory / part) for part in present}
    for part, images in found.items():
        if images.kind != "folders":
            raise UserError(f"{directory / part} must hold one directory of images for each class")
    moved = {
        part: _moved_up(matched(images, found["train"]), directory, part) for part, images in found.items()
    }
    return moved if "val" in moved else {"trainval": moved["train"], "test": moved["test"]}


def _moved_up(images: ImageSet, directory: Path, part: str) -> ImageSet:
    """The same images, with paths below the directory above."""
    keys = Strings(f"{part}/{images.keys[i]}" for i in range(len(images)))
    return ImageSet(
        LocalStore(directory), "folders", images.class_ids, images.labels, keys, (), images.places
    )


def _three(make: Callable[..., Any], root: Path, base: Path, download: bool) -> Parts:
    data = {split: make(root, split, loader=str, download=download) for split in ("train", "val", "test")}
    return _parts(base, {split: (found.classes, _samples(found)) for split, found in data.items()})


def _samples(dataset: Any) -> list[Sample]:
    return [(path, dataset.classes[label]) for path, label in (dataset[i] for i in range(len(dataset)))]


def _parts(base: Path, lists: dict[str, tuple[Sequence[str], list[Sample]]]) -> Parts:
    """Labels are matched by the name of a class: torchvision numbers the classes of each split by itself."""
    classes = tuple(next(iter(lists.values()))[0])
    number = {name: i for i, name in enumerate(classes)}
    sets = {}
    for part, (_, samples) in lists.items():
        for _, name in samples:
            if name not in number:
                raise UserError(
                    f"{base}: class {name!r} of the {part} images is not among the training images"
                )
        require_files((path for path, _ in samples), base)
        keys = Strings(path[len(str(base)) + 1 :] for path, _ in samples)
        labels = np.array([number[name] for _, name in samples], np.int32)
        sets[part] = ImageSet(
            LocalStore(base), "folders", classes, labels, keys, (), np.empty((0, 3), np.int64)
        )
    return sets


def require_files(paths: Iterable[str], base: Path) -> None:
    """UserError naming the first image that is listed and is not there. Lists directories; that is quicker."""
    present: dict[str, set[str]] = {}
    missing = []
    total = 0
    for path in paths:
        total += 1
        directory, _, name = path.rpartition("/")
        if directory not in present:
            where = Path(directory)
            present[directory] = {entry.name for entry in where.iterdir()} if where.is_dir() else set()
        if name not in present[directory]:
            missing.append(path)
    if missing:
        raise UserError(
            f"{base}: {len(missing):,} of {total:,} images are missing, the first is {missing[0]}"
        )
