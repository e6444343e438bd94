"""A dataset in object storage is the dataset on disk; what breaks off leaves nothing that looks whole."""

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ubgen.core import files
from ubgen.core.errors import UserError
from ubgen.core.stage import Stage, read_manifest
from ubgen.dataset import (
    LabelledImages,
    ShardWriter,
    finished_shard,
    finished_shards,
    open_dataset,
    open_store,
    write_classes,
)
from ubgen.pretrain import training_batches

NAMES = ["ant", "../bee", "crane\n"]


def write_dataset(out: str | Path, shards: int = 3, per_shard: int = 4) -> None:
    with Stage(out, "synth", {}).hold() as stage:
        stage.begin()
        write_classes(stage.store, ["a", "b", "c"], NAMES, NAMES)
        for shard in range(shards):
            with ShardWriter(stage.store, shard, "png") as writer:
                for position in range(shard * per_shard, (shard + 1) * per_shard):
                    label = position % 3
                    image = Image.fromarray(np.full((8, 8, 3), 10 * position, np.uint8))
                    writer.write(
                        position, image, label, {"class_name": NAMES[label]}, {"quality": position / 8}
                    )
                    writer.reject({"class_index": label, "attempt": 0, "reason": "constant"})
        stage.finish({}, dataset={"shards": shards, "images": shards * per_shard})


def test_the_same_bytes_as_on_disk(url: str, tmp_path: Path) -> None:
    write_dataset(url)
    write_dataset(tmp_path / "d")
    there, here = open_store(url), open_store(tmp_path / "d")
    names = [name for name in here.names() if name not in (".lock", "manifest.json", "run.json")]
    assert [name for name in there.names() if name not in ("manifest.json", "run.json")] == names
    assert len(names) == 10
    assert {name: there.read(name) for name in names} == {name: here.read(name) for name in names}
    assert there.sizes()["shard-000001.tar"] == here.size("shard-000001.tar")
    assert read_manifest(url, "synth")["dataset"] == {"shards": 3, "images": 12}


def test_read_by_index_in_order_and_in_workers(url: str) -> None:
    from torchvision.transforms.functional import pil_to_tensor

    write_dataset(url)
    dataset = open_dataset(Path(url))  # pathlib makes s3:/datasets of it
    assert [sample.label for sample in dataset] == [i % 3 for i in range(12)]
    assert np.asarray(dataset[7].image)[0, 0].tolist() == [70] * 3
    assert dataset[-1].meta == {"class_index": 2, "class_name": "crane\n", "quality": 11 / 8}
    assert dataset.shards[1].rejected()[0]["reason"] == "constant"
    data = LabelledImages(url, transform=pil_to_tensor)
    batches = list(torch.utils.data.DataLoader(data, batch_size=6, num_workers=1))
    assert torch.cat([labels for _, labels in batches]).tolist() == data.targets == [i % 3 for i in range(12)]
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].tolist() == [10 * i for i in range(12)]


def test_unfinished_missing_and_damaged(url: str) -> None:
    store = open_store(url)
    with pytest.raises(UserError, match="unfinished or not a ubgen synth or convert directory"):
        open_dataset(url)
    write_dataset(url)
    store.delete("shard-000001.json")
    store.write("shard-000002.tar", store.read("shard-000002.tar")[:-512])
    assert list(finished_shards(url)) == [0]
    with pytest.raises(UserError, match="shard 1 of 3 is missing or damaged"):
        open_dataset(url)
    store.delete("manifest.json")
    assert len(open_dataset(url, partial=True)) == 4


def test_files_of_a_directory(url: str) -> None:
    store = open_store(url)
    assert (store.names(), store.size("a"), store.local_path) == ([], None, None)
    store.write("a", "é")
    store.write("empty", b"")
    open_store(f"{url}/deeper").write("b", b"b")  # a directory below is not listed
    assert store.sizes() == {"a": 2, "empty": 0}
    assert store.read_starts(["a", "none", "empty"], 100) == ["é".encode(), b"", b""]
    assert store.read_range("a", 1, 100) == "é".encode()[1:]
    with store.open("a") as file:
        file.seek(1)
        assert file.read() == "é".encode()[1:]
    with pytest.raises(FileNotFoundError, match="none"):
        store.read("none")
    store.delete("a")
    store.delete("a")
    assert pickle.loads(pickle.dumps(store)).names() == ["empty"]


def test_of_many_that_create_a_file_one_succeeds(url: str) -> None:
    store = open_store(url)
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: store.create("lock", b"%d" % i) and won.append(i))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lock") == b"%d" % won[0]


def test_a_missing_bucket_is_named(url: str) -> None:
    with (
        pytest.raises(UserError, match=r"s3://nowhere/d/\.probe-\w+: cannot write \(.*bucket does not exist"),
        Stage("s3://nowhere/d", "synth", {}).hold(),
    ):
        pass


def write_big(url: str) -> None:
    with ShardWriter(url, 0) as writer:
        for position in range(10):
            writer.write(position, bytes([position]) * 50_000, 0, {})


def test_an_upload_that_breaks_half_way_is_no_shard(
    url: str, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAITS", (0.01,))
    proxy.limit = 200_000
    with pytest.raises(UserError, match=r"shard-000000\.tar: cannot write \(") as failure:
        write_big(url)
    assert "\n" not in str(failure.value)
    assert proxy.cuts >= 2  # it was tried more than once
    proxy.limit = 10**9
    assert open_store(url).names() == []
    assert finished_shard(url, 0) is None
    write_big(url)
    assert finished_shard(url, 0).count == 10


def test_an_upload_is_tried_again(url: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAITS", (0.01, 0.01, 0.01))
    proxy.limit, proxy.cuts_allowed = 200_000, 6
    write_big(url)
    assert proxy.cuts == 6
    assert finished_shard(url, 0).count == 10


def break_off(url: str, temporaries: Path) -> None:
    with ShardWriter(url, 0) as writer:
        writer.write(0, bytes(3_000_000), 0, {})
        assert os.listdir(temporaries) == []  # so that a killed process leaves none either
        writer.write(1, b"", 0, {"not JSON": object()})


def test_the_temporary_file_of_an_upload_goes(
    url: str, proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAITS", ())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TypeError):
        break_off(url, tmp_path)
    proxy.limit = 200_000
    with pytest.raises(UserError):
        write_big(url)
    assert os.listdir(tmp_path) == []


def test_a_backbone_is_trained_on_the_same_batches(url: str, tmp_path: Path) -> None:
    for place in (url, tmp_path / "local"):
        write_dataset(place)
        Stage(place, "synth", {}).store.write("manifest.json", '{"stage": "synth", "dataset": {"shards": 3}}')
    there, here = (
        list(training_batches(place, batch_size=5, image_size=16)) for place in (url, tmp_path / "local")
    )
    assert [batch["keys"] for batch in there] == [batch["keys"] for batch in here]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(there, here, strict=True))
