"""The transfer datasets that are known by name: Table 7 of the paper, and two small ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ubgen.evaluate import readers
from ubgen.evaluate.readers import Parts


class Sizes(NamedTuple):
    """Numbers of images."""

    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class TransferDataset:
    """Where a dataset lies below the root, as torchvision expects it, and how it is split."""

    title: str
    """As in the paper's tables."""
    classes: int
    sizes: Sizes
    """Of the paper's split (Table 7); for the small ones, ours."""
    validation: Literal["released", "proportional"] | int | None
    """The validation images of the paper's split: a released list; the table's number, drawn in proportion to the
    sizes of the classes; so many of each class; or, with None, 20 % of each class."""
    test_per_class: int | None = None
    """Test images that are drawn of each class, where no split was released."""
    read: Callable[[Path, bool], Parts]
    base: str = ""
    """Directory below the root; empty for what comes with a package."""
    files: tuple[str, ...] = ()
    """What must be in it."""
    source: str = ""
    """Where people get it."""
    downloads: bool = True
    """Whether torchvision can download all of it."""
    package: str = ""
    """The module that reading it needs."""
    elsewhere: Path | None = None
    """A directory of the system that serves when the root has none."""


_VGG = "https://www.robots.ox.ac.uk/~vgg/data"

DATASETS = {
    "aircraft": TransferDataset(
        title="Aircraft",
        classes=100,
        sizes=Sizes(3334, 3333, 3333),
        validation="released",
        read=readers.aircraft,
        base="fgvc-aircraft-2013b/data",
        files=(
            "images",
            "variants.txt",
            *(f"images_variant_{part}.txt" for part in ("train", "val", "test")),
        ),
        source=f"{_VGG}/fgvc-aircraft (fgvc-aircraft-2013b.tar.gz)",
    ),
    "cars": TransferDataset(
        title="Cars196",
        classes=196,
        sizes=Sizes(5700, 2444, 8041),
        validation="proportional",
        read=readers.cars,
        base="stanford_cars",
        files=(
            "cars_train",
            "cars_test",
            "cars_test_annos_withlabels.mat",
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
        ),
        source="a copy of Stanford Cars, whose own site no longer offers it",
        downloads=False,
        package="scipy",
    ),
    "dtd": TransferDataset(
        title="DTD",
        classes=47,
        sizes=Sizes(1880, 1880, 1880),
        validation="released",
        read=readers.dtd,
        base="dtd/dtd",
        files=("images", *(f"labels/{part}1.txt" for part in ("train", "val", "test"))),
        source=f"{_VGG}/dtd (dtd-r1.0.1.tar.gz)",
    ),
    "eurosat": TransferDataset(
        title="EuroSAT",
        classes=10,
        sizes=Sizes(13500, 5400, 8100),
        validation=540,
        test_per_class=810,
        read=readers.eurosat,
        base="eurosat/2750",
        source="https://github.com/phelber/eurosat (EuroSAT.zip, the RGB images)",
    ),
    "flowers": TransferDataset(
        title="Flowers",
        classes=102,
        sizes=Sizes(1020, 1020, 6149),
        validation="released",
        read=readers.flowers,
        base="flowers-102",
        files=("jpg", "imagelabels.mat", "setid.mat"),
        source=f"{_VGG}/flowers/102 (102flowers.tgz, imagelabels.mat, setid.mat)",
        package="scipy",
    ),
    "pets": TransferDataset(
        title="Pets",
        classes=37,
        sizes=Sizes(2570, 1110, 3669),
        validation=30,
        read=readers.pets,
        base="oxford-iiit-pet",
        files=("images", "annotations/trainval.txt", "annotations/test.txt"),
        source=f"{_VGG}/pets (images.tar.gz, annotations.tar.gz)",
    ),
    "food101": TransferDataset(
        title="Food101",
        classes=101,
        sizes=Sizes(68175, 7575, 25250),
        validation=75,
        read=readers.food101,
        base="food-101",
        files=("images", "meta/train.json", "meta/test.json"),
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101 (food-101.tar.gz)",
    ),
    "sun397": TransferDataset(
        title="SUN397",
        classes=397,
        sizes=Sizes(15880, 3970, 19850),
        validation=10,
        read=readers.sun397,
        base="SUN397",
        files=("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
        source="https://vision.princeton.edu/projects/2010/SUN (SUN397.tar.gz, and the two lists of Partitions.zip)",
        downloads=False,  # torchvision gets the images without the lists
    ),
    "fashionmnist": TransferDataset(
        title="FashionMNIST",
        classes=10,
        sizes=Sizes(48000, 12000, 10000),
        validation=None,
        read=readers.fashion_mnist,
        base="FashionMNIST/raw",
        source="https://github.com/zalandoresearch/fashion-mnist, or Debian's package dataset-fashion-mnist",
        elsewhere=readers.SYSTEM_FASHION_MNIST,
    ),
    "digits": TransferDataset(
        title="Digits",
        classes=10,
        sizes=Sizes(1042, 255, 500),
        validation=None,
        test_per_class=50,
        read=readers.digits,
        package="sklearn",
    ),
}

PAPER = ("aircraft", "cars", "dtd", "eurosat", "flowers", "pets", "food101", "sun397")
"""The eight of Table 1, in its order."""
