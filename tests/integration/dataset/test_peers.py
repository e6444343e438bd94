"""The libraries that people read datasets with open ours, and see every sample with its label."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ubgen.core.errors import Warned
from ubgen.dataset import open_dataset, write_classes
from ubgen.dataset.tools.convert import convert

LABELS = [position % 4 for position in range(24)]
SHARDS = "shard-{000000..000002}.tar"


def brightness(image: Image.Image) -> int:
    return round(float(np.asarray(image.convert("RGB")).mean()))


def check(images: list[Any], labels: list[Any]) -> None:
    """All samples, each image with the label that it was written with, in any order."""
    pairs = sorted(zip(labels, map(brightness, images), strict=True))
    assert pairs == sorted((position % 4, 60 * (position % 4) + position) for position in range(24))


def test_webdataset(dataset: Path, extension: str) -> None:
    import webdataset

    samples = webdataset.WebDataset(str(dataset / SHARDS), shardshuffle=False).decode("pil")
    rows = list(samples.to_tuple(extension, "cls", "json"))
    check([row[0] for row in rows], [row[1] for row in rows])
    assert rows[20][2]["flag"] == "quality"


def test_the_card_says_how_many_workers_there_may_be(jpegs: Path, tmp_path: Path) -> None:
    """And with what a loader may have more, which webdataset refuses otherwise."""
    import webdataset
    from torch.utils.data import DataLoader

    convert(jpegs, tmp_path / "out", "webdataset", 12)
    for place, shards in ((jpegs, 3), (tmp_path / "out", 2)):
        card = " ".join((place / "README.md").read_text().split())
        assert f"use at most `num_workers={shards}`, or pass `empty_check=False`" in card
    options = {"shardshuffle": False, "empty_check": False}
    samples = webdataset.WebDataset(str(tmp_path / "out/shard-{000000..000001}.tar"), **options)
    loader = DataLoader(samples.decode("pil").to_tuple("jpg", "cls"), batch_size=None, num_workers=3)
    rows = list(loader)
    check([row[0] for row in rows], [row[1] for row in rows])


def test_torchvision_image_folder(jpegs: Path, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    convert(jpegs, tmp_path / "out", "folder", 10)
    folder = ImageFolder(tmp_path / "out")
    assert folder.classes == ["n01440764", "n02012849", "n03126707", "n09999999"]
    check([image for image, _ in folder], [label for _, label in folder])


def test_timm_folder(jpegs: Path, tmp_path: Path) -> None:
    from timm.data import create_dataset

    convert(jpegs, tmp_path / "out", "folder", 10)
    samples = [(image, label) for image, label in create_dataset("", str(tmp_path / "out"))]
    check([image for image, _ in samples], [label for _, label in samples])


def test_timm_webdataset(jpegs: Path) -> None:
    from timm.data import create_dataset

    samples = list(create_dataset("wds/", str(jpegs), split=f"{SHARDS}|24"))
    check([image for image, _ in samples], [label for _, label in samples])


FOLDER_CLASSES = {
    "splits": ["dev", "eval-board", "test tube", "train", "val"],
    "mixed": [
        "zebra",
        "train",
        "Train",
        "validation.2",
        "cat",
        "a test",
        "data",
        "__pycache__",
        "logs.eval",
        "n2",
        "n10",
    ],
    "files": ["class_map.txt", "classes.json", "manifest.json", "metadata.jsonl", "run.json"],
    "sorted": ["a-dev", "a_testing", "training", "validation", "x.jpg", "y.zip"],
}


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    """Each with an image of its class's brightness."""
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            jpeg = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * int(sample["cls"]),) * 3).save(jpeg, "JPEG")
            for ending, data in {"jpg": jpeg.getvalue(), **sample}.items():
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of classes with hostile names, two images each, and one with a single image."""
    place = tmp_path_factory.mktemp("folders")
    for name, ids in {**FOLDER_CLASSES, "one": ["train"]}.items():
        images = 1 if name == "one" else 2 * len(ids)
        source = place / "sources" / name
        source.mkdir(parents=True)
        write_classes(source, ids, ids, ids)
        write_tar(source / "a.tar", [{"cls": b"%d" % (i % len(ids))} for i in range(images)])
        convert(source, place / name, "folder")
    return {name: place / name for name in (*FOLDER_CLASSES, "one")}


@pytest.mark.parametrize("name", FOLDER_CLASSES)
def test_folders_of_hostile_class_names(folders: dict[str, Path], name: str) -> None:
    """A class called "train" is a class: neither a split, nor the directory that timm looks for."""
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    want = sorted(2 * list(range(len(FOLDER_CLASSES[name]))))
    timms = [create_dataset("", str(folders[name]), split=split) for split in ("train", "validation")]
    for data in (ImageFolder(folders[name]), *timms):
        samples = [(label, brightness(image) / 20) for image, label in data]
        assert sorted(label for label, _ in samples) == want
        assert all(abs(label - level) < 0.2 for label, level in samples)


def read_with_dali(dataset: Path, extension: str, **options: int) -> tuple[list[Any], list[int]]:
    """Images and labels that DALI's reader yields on the CPU, with our index files."""
    dali = pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn

    @dali.pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipeline() -> Any:
        encoded, label = fn.readers.webdataset(
            paths=[str(dataset / f"shard-{i:06d}.tar") for i in range(3)],
            index_paths=[str(dataset / f"shard-{i:06d}.idx") for i in range(3)],
            ext=[extension, "cls"],
            missing_component_behavior="error",
            name="reader",
            **options,
        )
        return fn.decoders.image(encoded), label

    pipe = pipeline()
    pipe.build()
    images, labels = [], []
    for _ in range(pipe.reader_meta("reader")["epoch_size"] // 12 // options.get("num_shards", 1)):
        encoded, texts = pipe.run()
        images += [Image.fromarray(np.asarray(encoded.at(i))) for i in range(12)]
        labels += [int(bytes(np.asarray(texts.at(i)))) for i in range(12)]
    return images, labels


def test_dali(dataset: Path, extension: str) -> None:
    check(*read_with_dali(dataset, extension))


def test_dali_starts_in_the_middle(jpegs: Path) -> None:
    """The index lets the second of two readers skip the samples of the first."""
    images, labels = read_with_dali(jpegs, "jpg", num_shards=2, shard_id=1)
    assert labels == LABELS[12:]
    assert brightness(images[0]) == 60 * LABELS[12] + 12


HUGGING_FACE = """
import json, sys
import numpy as np
from datasets import ClassLabel, Image, load_dataset

def read(form, image, label, args, kwargs):
    data = load_dataset(*args, **kwargs, split="train", cache_dir=f"{sys.argv[2]}/{form}")
    assert isinstance(data.features[image], Image), data.features
    names = data.features[label].names if isinstance(data.features[label], ClassLabel) else None
    means = [round(float(np.asarray(row[image].convert("RGB")).mean())) for row in data]
    return {"means": means, "labels": list(data[label]), "names": names}

print(json.dumps({request["form"]: read(**request) for request in json.loads(sys.argv[1])}))
"""


LATER: dict[str, tuple[Any, Any]] = {  # values of a field in the first six samples, and in the others
    "null": (None, "a caption"),
    "to null": ("a caption", None),
    "number": (1, 1.5),
    "mixed": (3, "three"),
    "object": ({"x": 1}, "y"),
    "list": ([], [1]),
    "items": ([None], [1]),
    "inner": ({"x": None, "y": [{"z": 1}]}, {"x": 2, "y": [{"z": None}]}),
    "large": (1, 2**64),
    "text": ("a", "\ud800"),
    "same": ({"x": [1.5], "y": None}, {"x": [2.5], "y": None}),
}


@pytest.fixture(scope="session")
def changing_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards made from a tar whose JSON has fields that change their type on the way."""
    place = tmp_path_factory.mktemp("json")
    (place / "source").mkdir()
    metas = [{name: values[i > 5] for name, values in LATER.items()} for i in range(12)]
    samples = [{"cls": b"%d" % (i % 4), "json": json.dumps(meta).encode()} for i, meta in enumerate(metas)]
    write_tar(place / "source" / "a.tar", samples)
    with pytest.warns(Warned) as told:
        convert(place / "source", place / "out", "webdataset", 8)
    assert [str(warning.message) for warning in told] == [
        "the samples' JSON has values in 'items', 'large', 'mixed' and 1 more that no column of one type holds; "
        "they become text",
        "the samples' JSON has 'inner', 'list', 'null' and 1 more empty in some samples; there the field is left out",
    ]
    return place / "out"


@pytest.fixture(scope="session")
def read_by_hugging_face(
    datasets_by_extension: Callable[[str], Path],
    folders: dict[str, Path],
    changing_json: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, Any]]:
    """What load_dataset makes of each form, by its name; once for each kind of image."""

    @cache
    def read(extension: str) -> dict[str, Any]:
        dataset, place = datasets_by_extension(extension), tmp_path_factory.mktemp("hugging-face")
        for form in ("parquet", "folder"):
            convert(dataset, place / form, form, 10)
        return hugging_face(
            place,
            request("shards", extension, "cls", "webdataset", data_files=str(dataset / "shard-*.tar")),
            request("card", extension, "cls", str(dataset)),
            request("parquet", "image", "label", str(place / "parquet")),
            request("parts", "image", "label", "parquet", data_files=str(place / "parquet/train-*.parquet")),
            request("folder", "image", "label", str(place / "folder")),
            request("changing JSON", "jpg", "cls", str(changing_json)),
            *(request(name, "image", "label", str(path)) for name, path in folders.items()),
            *(
                request(f"{name} by name", "image", "label", "imagefolder", data_dir=str(path))
                for name, path in folders.items()
            ),
        )

    return read


def request(form: str, image: str, label: str, *args: str, **kwargs: str) -> dict[str, Any]:
    return {"form": form, "image": image, "label": label, "args": args, "kwargs": kwargs}


def hugging_face(place: Path, *requests: dict[str, Any]) -> dict[str, Any]:
    """load_dataset in a process of its own: it reads where it may look for data when it is imported."""
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, json.dumps(requests), str(place / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["shards", "card", "parquet", "parts", "folder"])
def test_hugging_face(
    read_by_hugging_face: Callable[[str], dict[str, Any]], extension: str, form: str
) -> None:
    """Only sample 20 has a flag, which those that it looks at to find the columns of the shards do not have."""
    read = read_by_hugging_face(extension)[form]
    pairs = sorted(zip(read["labels"], read["means"], strict=True))
    assert pairs == sorted((position % 4, 60 * (position % 4) + position) for position in range(24))
    if form in ("parquet", "parts"):
        assert read["names"] == ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)", "../a/b <b>"]


@pytest.mark.parametrize("how", ["", " by name"])
def test_hugging_face_folders(read_by_hugging_face: Callable[[str], dict[str, Any]], how: str) -> None:
    """Of any number of images, whatever the classes are called."""
    for name, ids in FOLDER_CLASSES.items():
        read = read_by_hugging_face("jpg")[name + how]
        assert sorted(read["labels"]) == sorted(2 * list(range(len(ids))))
        assert all(
            abs(20 * label - mean) < 4 for label, mean in zip(read["labels"], read["means"], strict=True)
        )
    assert read_by_hugging_face("jpg")["one" + how]["labels"] == [0]


def test_hugging_face_reads_json_whose_fields_change(
    read_by_hugging_face: Callable[[str], dict[str, Any]], changing_json: Path
) -> None:
    read = read_by_hugging_face("jpg")["changing JSON"]
    assert read["labels"] == [i % 4 for i in range(12)]
    metas = [sample.meta for sample in open_dataset(changing_json)]
    assert metas[0] == {
        "class_index": 0,
        "to null": "a caption",
        "number": 1.0,
        "mixed": "3",
        "object": '{"x": 1}',
        "items": "[null]",
        "inner": {"y": [{"z": 1}]},
        "large": "1",
        "text": "a",
        "same": {"x": [1.5], "y": None},
    }
    assert isinstance(metas[0]["number"], float)
    assert metas[11] == {
        "class_index": 3,
        "null": "a caption",
        "number": 1.5,
        "mixed": "three",
        "object": "y",
        "list": [1],
        "items": "[1]",
        "inner": {"x": 2, "y": [{}]},
        "large": "18446744073709551616",
        "text": "?",
        "same": {"x": [2.5], "y": None},
    }


def test_mlcroissant(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It unpacks tars into a cache that knows them by name alone, so that each dataset needs a cache of its own."""
    import mlcroissant
    from etils import epath
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", epath.Path(tmp_path / "extract"))
    croissant = mlcroissant.Dataset(str(dataset / "croissant.json"))
    assert not croissant.metadata.ctx.issues.errors
    # of what is only recommended, the date of publication alone is missing, which nothing here knows
    assert all("datePublished" in warning for warning in croissant.metadata.ctx.issues.warnings)
    about = croissant.metadata
    assert "All images are synthetic" in about.data_collection
    assert "inherit the biases of mini" in " ".join(about.data_biases)
    assert about.data_social_impact
    assert about.annotations_per_item == "1"
    assert len(about.machine_annotation_tools) == 3
    records = list(croissant.records("samples"))
    check([record["samples/image"] for record in records], [record["samples/label"] for record in records])
    assert {round(record["samples/quality"], 6) for record in records} == {1 + i / 8 for i in range(24)}
    classes = list(croissant.records("classes"))
    assert [record["classes/index"] for record in classes] == [0, 1, 2, 3]
    assert classes[1]["classes/name"] == b"crane"


def test_hugging_face_card(jpegs: Path) -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(jpegs / "README.md")
    assert (card.data.license, card.data.pretty_name) == ("mit", "miniature")
