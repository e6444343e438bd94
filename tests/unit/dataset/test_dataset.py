"""The dataset format: any class name survives, other readers open it, damage is noticed."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.dataset import LabelledImages, ShardWriter, finished_shard, open_dataset, write_classes

HOSTILE = [
    "a/b",
    "../../etc/passwd",
    "..",
    "line\nbreak",
    "\u202eright to left",
    "x" * 300,
    "nul\0",
    ".",
    "c:\\d",
    "é",
]


def picture(value: int) -> Image.Image:
    ramp = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.ones(3)
    return Image.fromarray(((ramp + value) % 256).astype(np.uint8))


def write_dataset(
    out: Path, names: list[str], shards: int = 2, per_shard: int = 4, extension: str = "png"
) -> Path:
    with Stage(out, "synth", {}).hold() as stage:
        stage.begin()
        write_classes(out, [f"c{i}" for i in range(len(names))], names, names)
        for shard in range(shards):
            with ShardWriter(out, shard, extension) as writer:
                for position in range(shard * per_shard, (shard + 1) * per_shard):
                    label = position % len(names)
                    meta = {"class_name": names[label], "prompt": names[label]}
                    writer.write(position, picture(position), label, meta, {"quality": position / 8})
        stage.finish({}, dataset={"shards": shards, "images": shards * per_shard})
    return out


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name.startswith("shard-")}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.one_of(st.text(min_size=1, max_size=40), st.sampled_from(HOSTILE)), min_size=1, max_size=6
    ),
    extension=st.sampled_from(["jpg", "png"]),
)
def test_any_class_name_survives_and_none_reaches_a_path(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], extension: str
) -> None:
    out = write_dataset(tmp_path_factory.mktemp("data") / "out", names, extension=extension)
    samples = list(open_dataset(out))
    assert [s.class_name for s in samples] == [names[i % len(names)] for i in range(8)]
    assert [s.meta["prompt"] for s in samples] == [s.class_name for s in samples]
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    with tarfile.open(out / "shard-000000.tar") as tar:
        members = tar.getnames()
    assert members == [f"{i:09d}.{suffix}" for i in range(4) for suffix in (extension, "cls", "json")]


def test_pixels_labels_and_scores_come_back(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "d", ["a", "b", "c"]))
    assert len(dataset) == 8
    for i, sample in enumerate(dataset):
        assert np.array_equal(np.asarray(sample.image), np.asarray(picture(i)))
        assert (sample.label, sample.meta["quality"]) == (i % 3, i / 8)
        assert dataset[i].meta == sample.meta
    assert dataset[-1].label == dataset[7].label
    assert [s.label for s in dataset[2:5]] == [2, 0, 1]
    assert [entry.scores["quality"] for entry in dataset.entries()] == [i / 8 for i in range(8)]
    with pytest.raises(IndexError):
        dataset[8]


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first = files(write_dataset(tmp_path / "one", HOSTILE, extension="jpg"))
    os.umask(os.umask(0o077))
    second = files(write_dataset(tmp_path / "two", HOSTILE, extension="jpg"))
    assert first == second
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_torchvision_style(tmp_path: Path) -> None:
    from torchvision.transforms.functional import to_tensor

    data = LabelledImages(write_dataset(tmp_path / "d", ["a", "b"]), transform=to_tensor)
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=8, num_workers=2)))
    assert images.shape == (8, 3, 16, 16)
    assert labels.tolist() == data.targets == [0, 1] * 4
    assert data.classes == ["a", "b"]


def test_an_exception_leaves_no_shard_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError), ShardWriter(tmp_path, 0) as writer:
        writer.write(0, picture(0), 0, {"not JSON": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_its_sidecar_is_unfinished(tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "d", ["a"])
    (out / "shard-000001.json").unlink()
    assert finished_shard(out, 0) is not None
    assert finished_shard(out, 1) is None
    with pytest.raises(UserError, match="shard 1 of 2 is missing or damaged"):
        open_dataset(out)


def test_an_unfinished_dataset_opens_only_on_request(tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "d", ["a"])
    (out / "manifest.json").unlink()
    (out / "shard-000001.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(out)
    assert len(open_dataset(out, partial=True)) == 4
    with pytest.raises(UserError, match="nothing: no such directory"):
        open_dataset(tmp_path / "nothing", partial=True)


def test_two_samples_cannot_share_a_place(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as writer:
        writer.write(3, picture(0), 0, {})
        with pytest.raises(ValueError, match="position 3"):
            writer.write(3, picture(1), 0, {})
