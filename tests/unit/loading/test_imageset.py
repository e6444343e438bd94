import io
import json
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from ubgen.core.errors import UserError
from ubgen.dataset.tools.convert import convert
from ubgen.loading.imageset import epoch_order, matched, open_image_set, rank_order, require_class_count


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 200), ranks=st.integers(1, 12), seed=st.integers(-(2**63), 2**63 - 1))
def test_each_epoch_shows_every_sample_once_over_all_ranks(count: int, ranks: int, seed: int) -> None:
    for epoch in (0, 1):
        parts = [rank_order(count, seed, epoch, rank, ranks) for rank in range(ranks)]
        assert Counter(np.concatenate(parts).tolist()) == Counter(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 200), batch=st.integers(1, 12), steps=st.integers(1, 5))
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(
    count: int, batch: int, steps: int
) -> None:
    together = epoch_order(count, 3, 1)[: steps * 12 * batch]
    for ranks in (1, 2, 3, 4):
        each = steps * 12 * batch // ranks
        found = np.concatenate([rank_order(count, 3, 1, rank, ranks)[:each] for rank in range(ranks)])
        assert sorted(found) == sorted(together)


def test_orders_differ_by_epoch_and_seed_and_stay_as_they_are() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert tuple(epoch_order(50, 0, 2)) == orders[2]
    assert epoch_order(8, 0, 0).tolist() == [
        0,
        3,
        7,
        5,
        1,
        2,
        6,
        4,
    ]  # a run of another NumPy continues this one


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="below ranks"):
        rank_order(5, 0, 0, 2, 2)


def test_shards_of_different_sizes(make: SimpleNamespace, shards: Path) -> None:
    data = open_image_set(shards)
    assert len(data) == 20
    assert data.class_ids == ("c0", "c1", "c2")
    assert data.labels.tolist() == [i % 3 for i in range(20)]
    assert [data.keys[i] for i in (0, 7, 19)] == ["000000000", "000000007", "000000019"]
    assert all(data.read(i) == make.encoded(make.picture(i)) for i in range(20))


@pytest.mark.parametrize("damage", ["place", "class", "key"])
def test_a_damaged_sidecar_is_refused(make: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    root = make.shards(tmp_path, [3])
    sidecar = root / "shard-000000.json"
    text = sidecar.read_text()
    place = json.dumps(json.loads(text)["samples"][2]["image"], separators=(",", ":"))
    old, new = {
        "place": (place, f"[{'9' * (len(place) - 4)},1]"),  # beyond the end of the tar
        "class": ('"class_index":2', '"class_index":9'),
        "key": ('"key"', '"kez"'),
    }[damage]
    assert old in text
    sidecar.write_text(text.replace(old, new))
    with pytest.raises(UserError, match="shard-000000"):
        open_image_set(root)


def test_folders_are_labelled_as_torchvision_does(make: SimpleNamespace, tmp_path: Path) -> None:
    root = make.folders(tmp_path / "data", ["2", "10", "b", "A"])
    (root / "b" / "deeper").mkdir()
    (root / "b" / "deeper" / "x.JPEG").write_bytes(make.encoded(make.picture(5)))
    (root / "b" / "notes.txt").write_text("no image")
    data, reference = open_image_set(root), ImageFolder(root)
    assert list(data.class_ids) == reference.classes == ["10", "2", "A", "b"]
    found = {data.describe(i): int(data.labels[i]) for i in range(len(data))}
    assert found == dict(reference.samples)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_others(make: SimpleNamespace, tmp_path: Path) -> None:
    image = make.encoded(make.picture(1))
    write_tar(tmp_path / "a.tar", {"x/1.jpg": image, "x/1.cls": b"4", "x/2.cls": b"0", "x/2.png": b"png"})
    write_tar(
        tmp_path / "b.tar",
        {f"{i}.{e}": c for i in (1, 2, 3) for e, c in (("jpeg", image), ("cls", b"%d" % i))},
    )
    (tmp_path / "a.idx").write_text("v1.2 1\nwrong")
    data = open_image_set(tmp_path)
    assert data.labels.tolist() == [4, 0, 1, 2, 3]
    assert [data.keys[i] for i in range(5)] == ["x/1", "x/2", "1", "2", "3"]
    assert data.class_ids == ("0", "1", "2", "3", "4")
    assert data.read(0) == data.read(3) == image
    assert data.read(1) == b"png"
    (tmp_path / "classes.txt").write_text("".join(f"id{i}\tname {i}\n" for i in range(5)))
    named = open_image_set(tmp_path, str(tmp_path / "classes.txt"))
    assert named.class_ids == ("id0", "id1", "id2", "id3", "id4")
    (tmp_path / "few.txt").write_text("only\n")
    with pytest.raises(UserError, match=r"a\.tar: label 4, but there are only 1 classes"):
        open_image_set(tmp_path, str(tmp_path / "few.txt"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"x"}, "no .cls"),
        ({"1.cls": b"1"}, "one image"),
        ({"1.jpg": b"x", "1.cls": b"dog"}, "class index"),
    ],
)
def test_tars_without_image_or_label_are_refused(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        open_image_set(tmp_path)


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(UserError, match=r"a\.tar is not a readable tar"):
        open_image_set(tmp_path)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_image_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a dataset"):
        open_image_set(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_image_set(tmp_path)


def test_an_empty_class_is_named(make: SimpleNamespace, tmp_path: Path) -> None:
    root = make.folders(tmp_path, ["cat", "dog"])
    (root / "emu").mkdir()
    with pytest.raises(UserError, match="class 'emu' has no image"):
        open_image_set(root)


def test_the_number_of_classes_is_checked(shards: Path) -> None:
    data = open_image_set(shards)
    require_class_count(data, 3)
    with pytest.raises(UserError, match=r"--num-classes 5: .* has 3 classes"):
        require_class_count(data, 5)


def test_validation_is_matched_by_class_id(make: SimpleNamespace, tmp_path: Path, shards: Path) -> None:
    training = open_image_set(shards)
    validation = open_image_set(make.folders(tmp_path / "a", ["c2", "c0", "c1"]))
    reordered = open_image_set(write_tar_with_classes(tmp_path / "b", ["c2", "c0", "c1"]))
    assert matched(validation, training).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert matched(reordered, training).labels.tolist() == [2, 0, 1]
    more = open_image_set(make.folders(tmp_path / "c", ["c0", "c1", "c2", "emu"]))
    with pytest.raises(UserError, match="class 'emu'"):
        matched(more, training)
    fewer = open_image_set(make.folders(tmp_path / "d", ["c0", "c1"]))
    with pytest.raises(UserError, match="class 'c2'"):
        matched(fewer, training)


def write_tar_with_classes(root: Path, ids: list[str]) -> Path:
    root.mkdir()
    write_tar(
        root / "a.tar",
        {f"{i}.{e}": c for i in range(len(ids)) for e, c in (("jpg", b"x"), ("cls", b"%d" % i))},
    )
    entries = [{"index": i, "id": name, "name": name} for i, name in enumerate(ids)]
    (root / "classes.json").write_text(json.dumps(entries))
    return root


def synthetic_index(make: SimpleNamespace, root: Path, shards: int, each: int) -> Path:
    """Sidecars of real form beside tars that are holes: only the index counts."""
    make.shards(root, [1])
    sidecar = json.loads((root / "shard-000000.json").read_text())
    sample = sidecar["samples"][0]
    for number in range(shards):
        samples = [{**sample, "key": f"{number * each + i:09d}", "class_index": i % 3} for i in range(each)]
        rest = f'"samples":{json.dumps(samples, separators=(",", ":"))},"rejected":[]}}\n'
        head = {**sidecar, "shard": f"shard-{number:06d}.tar", "count": each, "rest": len(rest)}
        del head["samples"], head["rejected"]
        text = json.dumps(head, separators=(",", ":"))[:-1]
        (root / f"shard-{number:06d}.json").write_text(f"{text},{rest}")
        with (root / f"shard-{number:06d}.tar").open("wb") as file:
            file.truncate(sidecar["bytes"])
    (root / "manifest.json").write_text(json.dumps({"stage": "synth", "dataset": {"shards": shards}}))
    return root


def test_an_index_in_memory_is_small(make: SimpleNamespace, tmp_path: Path) -> None:
    root = synthetic_index(make, tmp_path, 10, 1000)
    open_image_set(root)  # what is imported on the way does not count
    tracemalloc.start()
    data = open_image_set(root)
    order = epoch_order(len(data), 0, 0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) == 10_000
    assert held / len(order) * 1.3e6 < 200e6


@pytest.mark.slow
def test_a_dataset_of_imagenet_size_opens_quickly(make: SimpleNamespace, tmp_path: Path) -> None:
    root = synthetic_index(make, tmp_path, 1300, 1000)
    begun = time.process_time()  # of this process: others share the machine
    data = open_image_set(root)
    order = epoch_order(len(data), 0, 0)
    assert time.process_time() - begun < 10
    assert len(order) == 1_300_000
    held = data.labels.nbytes + data.places.nbytes + data.keys.nbytes + order.nbytes
    assert held < 200e6


def test_a_conversion_to_folders_keeps_the_class_ids(make: SimpleNamespace, tmp_path: Path) -> None:
    root = make.shards(tmp_path / "shards", [24], classes=12)  # c10 sorts before c2, so folders get numbers
    convert(root, tmp_path / "folders", "folder")
    assert not (tmp_path / "folders" / "c10").exists()
    training = open_image_set(root)
    validation = matched(open_image_set(tmp_path / "folders"), training)
    assert validation.kind == "folders"
    assert validation.labels.tolist() == sorted(training.labels.tolist())
