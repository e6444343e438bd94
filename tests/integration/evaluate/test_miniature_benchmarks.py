"""The miniature's benchmarks through the readers of the real ones."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ubgen.core.categories import load_mapping
from ubgen.evaluate.cue_conflict import open_cue_conflict
from ubgen.evaluate.datasets import open_datasets
from ubgen.evaluate.focus import open_focus
from ubgen.evaluate.in9 import open_backgrounds
from ubgen.loading.imageset import matched, open_image_set
from ubgen.miniature.benchmarks import WriteConfig, write
from ubgen.miniature.shapes import TRAIN_CLASSES
from ubgen.miniature.tasks import TASKS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("world") / "benchmarks"
    write(WriteConfig("benchmarks", out, scale=0.01), Console(file=io.StringIO()))
    return out


def test_the_transfer_tasks_are_image_folders_that_can_be_divided(root: Path) -> None:
    for name, data in open_datasets([task.name for task in TASKS], root).items():
        (task,) = (task for task in TASKS if task.name == name)
        assert sorted(data.trainval.class_ids) == sorted(task.classes)
        fit, validate = data.split(0)
        for part in (fit, validate):
            assert set(data.trainval.labels[part]) == set(range(len(task.classes)))
        for images in (data.trainval, data.test):
            folders = [images.keys[i].split("/")[1] for i in range(len(images))]
            assert folders == [images.class_ids[k] for k in images.labels]


def test_the_worlds_have_the_same_classes(root: Path) -> None:
    training = open_image_set(root / "train-biased")
    assert sorted(training.class_ids) == sorted(TRAIN_CLASSES)
    for name in ("train-fair", "val-fair", "val-biased"):
        matched(open_image_set(root / name), training)


def test_cue_conflict_is_read_with_its_textures(root: Path) -> None:
    data = open_cue_conflict(root / "cue-conflict", load_mapping("cue-conflict-miniature"))
    assert len(data.images) == 8 * 7 * 2
    assert data.same == 8 * 2
    for i in range(len(data.images)):
        shape, texture = data.mapping.names[data.images.labels[i]], data.textures[i]
        assert data.images.keys[i].startswith(f"{shape}/{shape}")
        assert f"-{texture}" in data.images.keys[i]


def test_focus_is_read_with_its_partitions(root: Path) -> None:
    data = open_focus(root / "focus", load_mapping("focus-miniature"))
    assert np.bincount(data.uncommon).tolist() == [20, 20, 20, 20]
    assert np.bincount(data.images.labels).tolist() == [8] * 10
    data.images.read(0)


def test_in9_is_read_in_pairs(root: Path) -> None:
    data = open_backgrounds(root / "in9", load_mapping("in9-miniature"))
    assert data.paired
    assert len(data.images) == 40
    data.images.read(39)
