"""A shard says truly whether it is whole, holds what was written, and opens with the field's own tools."""

import io
import itertools
import json
import tarfile
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wds2idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.dataset import (
    ShardWriter,
    encode_image,
    finished_shard,
    finished_shards,
    index_of,
    is_marked_synthetic,
    mark_synthetic,
    open_dataset,
    open_store,
    shard_files,
    write_classes,
)
from ubgen.dataset.tools.verify import verify

SCORES = st.dictionaries(st.sampled_from(["quality", "clip_similarity"]), st.floats())
TEXTS = st.one_of(
    st.text(max_size=30), st.sampled_from(["../x", "a\nb", "y" * 300, "\u202eabc", "nul\0", "\ud800"])
)
SAMPLES = st.lists(
    st.tuples(
        st.integers(1, 10**6),
        st.binary(max_size=3000),
        st.integers(0, 999),
        st.dictionaries(TEXTS, TEXTS, max_size=3),
        SCORES,
        st.none() | TEXTS,
    ),
    max_size=5,
)
Row = tuple[int, bytes, int, dict[str, str], dict[str, float], str | None]


def write(where: Any, rows: list[Row], rejected: list[dict[str, Any]], index: int = 0) -> None:
    positions = itertools.accumulate(row[0] for row in rows)
    with ShardWriter(where, index, "jpg") as writer:
        for position, (_, data, label, meta, scores, flag) in zip(positions, rows, strict=True):
            writer.write(position, data, label, meta, scores, flag)
        for entry in rejected:
            writer.reject(entry)


def plain_shard(where: Any, index: int = 0, count: int = 4) -> None:
    write(where, [(i + 1, b"image%d" % i, i, {}, {"quality": 1.5}, None) for i in range(count)], [], index)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SAMPLES, rejected=st.lists(SCORES.map(lambda s: {**s, "reason": "\u202e\n"}), max_size=2))
def test_any_samples_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], rejected: list[dict[str, Any]]
) -> None:
    out = tmp_path_factory.mktemp("d")
    write(out, rows, rejected)
    info = finished_shard(out, 0)
    assert info is not None
    sidecar = json.loads((out / "shard-000000.json").read_bytes())
    assert list(sidecar) == ["shard", "count", "bytes", "sha256", "extension", "rest", "samples", "rejected"]
    head = (info.tar, info.count, info.bytes, info.sha256, info.extension)
    assert head == tuple(sidecar[name] for name in ("shard", "count", "bytes", "sha256", "extension"))
    entries = [json.loads(json.dumps(sample.to_entry())) for sample in info.samples()]
    assert (entries, info.rejected()) == (sidecar["samples"], sidecar["rejected"])
    content = (out / "shard-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = tar.getnames()
        members = [tar.extractfile(name).read() for name in names]
    assert all(name.split(".")[0].isdigit() and "/" not in name for name in names)
    for row, entry, (image, label, meta) in zip(rows, sidecar["samples"], triples(members), strict=True):
        assert (image, label) == (row[1], str(row[2]).encode())
        scores = {name: value if np.isfinite(value) else None for name, value in row[4].items()}
        about = {**scores, "class_index": row[2]} | ({"flag": row[5]} if row[5] is not None else {})
        assert json.loads(meta) == {**row[3], **about}
        assert about.items() <= entry.items()
        for name, data in (("image", image), ("cls", label), ("json", meta)):
            offset, size = entry[name]
            assert content[offset : offset + size] == data
    assert [list(entry.values())[-1] for entry in sidecar["rejected"]] == ["\u202e\n"] * len(rejected)


def triples(members: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    return list(zip(members[::3], members[1::3], members[2::3], strict=True))


@settings(max_examples=20, deadline=None)
@given(rows=SAMPLES)
def test_the_bytes_are_the_same_wherever_they_are_written(rows: list[Row]) -> None:
    stores = [open_store(f"memory://{uuid.uuid4().hex}") for _ in range(2)]
    for store in stores:
        write(store, rows, [])
    one, two = ({name: store.read(name) for name in store.names()} for store in stores)
    assert one == two
    assert list(one) == ["shard-000000.idx", "shard-000000.json", "shard-000000.tar"]


@settings(max_examples=20, deadline=None)
@given(rows=SAMPLES)
def test_the_tar_is_what_tarfile_writes(rows: list[Row]) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    write(store, rows, [])
    content, again = store.read("shard-000000.tar"), io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as ours,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for info in ours:
            plain = tarfile.TarInfo(info.name)
            plain.size = info.size
            tar.addfile(plain, ours.extractfile(info))
    assert content == again.getvalue()


def test_a_cut_file_is_no_finished_shard(tmp_path: Path) -> None:
    """Whatever is missing, of the tar or of the sidecar."""
    plain_shard(tmp_path)
    for name in ("shard-000000.tar", "shard-000000.json"):
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 1, 20, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:cut])
            assert finished_shard(tmp_path, 0) is None
        (tmp_path / name).write_bytes(whole + b" ")
        assert finished_shard(tmp_path, 0) is None
        (tmp_path / name).write_bytes(whole)
    assert finished_shard(tmp_path, 0).count == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"count":4', b'"count":-'),
        (b'"count":4', b'"count":x'),
        (b'"sha256":"', b'"sha257":"'),
        (b'"extension":"jpg"', b'"extension":"../"'),
        (b"shard-000000.tar", b"../../../../x.ta"),
        (b'{"shard"', b'["shard"'),
    ],
)
def test_an_edited_head_is_no_finished_shard(tmp_path: Path, old: bytes, new: bytes) -> None:
    plain_shard(tmp_path)
    sidecar = tmp_path / "shard-000000.json"
    sidecar.write_bytes(sidecar.read_bytes().replace(old, new))
    assert finished_shard(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"image":[512,', b'"image":[-12,'),
        (b'"image":[512,', b'"image":[9e9,'),
        (b'"image":[512,', b'"image":[ {},'),
        (b'"class_index":3', b'"class_index":9'),
        (b'"class_index":3', b'"class_indeX":3'),
        (b'"samples":[{', b'"samples":[['),
    ],
)
def test_edited_samples_are_refused_when_they_are_read(tmp_path: Path, old: bytes, new: bytes) -> None:
    with Stage(tmp_path, "synth", {}).hold() as stage:
        stage.begin()
        write_classes(tmp_path, list("abcd"), list("abcd"), list("abcd"))
        plain_shard(tmp_path)
        stage.finish({}, dataset={"shards": 1, "images": 4})
    sidecar = tmp_path / "shard-000000.json"
    assert old in sidecar.read_bytes()
    sidecar.write_bytes(sidecar.read_bytes().replace(old, new))
    with pytest.raises(UserError, match=r"shard-000000\.json is damaged"):
        open_dataset(tmp_path).labels()


def test_finished_shards_are_found_by_their_heads(tmp_path: Path) -> None:
    for index in (0, 2, 5):
        plain_shard(tmp_path, index, count=index)
    (tmp_path / "shard-000002.tar").write_bytes(b"")
    (tmp_path / "shard-000007.json").write_bytes(b"{}")
    assert {i: info.count for i, info in finished_shards(tmp_path).items()} == {0: 0, 5: 5}
    assert list(finished_shards(tmp_path, [5, 1])) == [5]
    assert finished_shards(tmp_path / "nowhere") == {}


def test_names_of_shards_and_their_leftovers() -> None:
    names = ["shard-000001.tar", "shard-000002.idx", "shard-1000000.json", ".shard-000003.tar.ab_12345.tmp"]
    others = ["shard-notes.json", "shard-000001.tar.gz", "README.md", ".shard-000003.tar"]
    assert shard_files(names + others) == dict(zip(names, (1, 2, 1000000, 3), strict=True))


def test_a_sidecar_of_another_tar_goes_before_the_tar_comes(tmp_path: Path) -> None:
    plain_shard(tmp_path)
    old = (tmp_path / "shard-000000.json").read_bytes()
    (tmp_path / "shard-000000.idx").unlink()
    (tmp_path / "shard-000000.idx").mkdir()
    with pytest.raises(IsADirectoryError):  # the writer ends after the tar, before its sidecar
        write(tmp_path, [(1, b"other!", 0, {}, {}, None)], [])
    assert not (tmp_path / "shard-000000.json").exists()
    (tmp_path / "shard-000000.json").write_bytes(old)
    (tmp_path / "shard-000000.idx").rmdir()
    plain_shard(tmp_path)
    assert finished_shard(tmp_path, 0).count == 4


def test_positions_increase(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as writer:
        writer.write(3, b"", 0, {})
        for position in (3, 2, -1):
            with pytest.raises(ValueError, match=f"position {position} comes after 3"):
                writer.write(position, b"", 0, {})


def test_the_index_is_what_dalis_tool_writes(tmp_path: Path) -> None:
    plain_shard(tmp_path, count=7)
    index = (tmp_path / "shard-000000.idx").read_text()
    with wds2idx.IndexCreator(
        str(tmp_path / "shard-000000.tar"), str(tmp_path / "tool"), verbose=False
    ) as tool:
        tool.create_index()
    assert index == (tmp_path / "tool").read_text()
    assert index == index_of(finished_shard(tmp_path, 0).samples(), "jpg")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_every_image_says_that_it_is_synthetic(extension: str) -> None:
    pixels = np.add.outer(np.arange(0, 160, 10), np.arange(16))[..., None].repeat(3, 2).astype(np.uint8)
    data = encode_image(pixels, extension)
    assert data == encode_image(Image.fromarray(pixels), extension) == mark_synthetic(data)
    assert is_marked_synthetic(data)
    image = Image.open(io.BytesIO(data))
    assert b"DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trained" in xmp(image)
    assert np.abs(np.asarray(image).astype(int) - pixels).max() <= (0 if extension == "png" else 3)


def xmp(image: Image.Image) -> bytes:
    found = image.info.get("xmp") or image.info["XML:com.adobe.xmp"]
    return found if isinstance(found, bytes) else found.encode()


def test_the_mark_goes_where_the_formats_want_it() -> None:
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    Image.new("RGB", (8, 8)).save(png, "PNG")
    plain = jpeg.getvalue()
    marked = mark_synthetic(plain)
    assert marked[:20] == plain[:20]  # JFIF's APP0 stays the first segment
    assert marked[20:22] == b"\xff\xe1"
    assert marked.endswith(plain[20:])
    assert not is_marked_synthetic(plain)
    without_jfif = plain[:2] + plain[20:]
    assert mark_synthetic(without_jfif)[2:4] == b"\xff\xe1"
    chunk = mark_synthetic(png.getvalue())[33:]
    length = int.from_bytes(chunk[:4], "big")
    assert zlib.crc32(chunk[4 : 8 + length]) == int.from_bytes(chunk[8 + length : 12 + length], "big")
    with pytest.raises(ValueError, match="neither"):
        mark_synthetic(b"GIF89a")


def featured(out: Path, rows: np.ndarray) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with Stage(out, "synth", {}).hold() as stage:
        stage.begin()
        write_classes(out, ["a"], ["a"], ["a"])
        with ShardWriter(out, 0) as shard:
            for position, row in enumerate(rows):
                shard.write(position, picture, 0, {}, features=row)
        stage.finish({}, dataset={"shards": 1, "images": len(rows)})


def test_features_come_back_as_float16(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    featured(tmp_path / "with", rows)
    assert np.array_equal(open_dataset(tmp_path / "with").features(), rows.astype(np.float16))
    assert verify(tmp_path / "with").problems == []
    (tmp_path / "without").mkdir()
    plain_shard(tmp_path / "without")
    assert finished_shard(tmp_path / "without", 0).read_features() is None
    assert not (tmp_path / "without/shard-000000.npy").exists()


def test_damaged_features_are_found(tmp_path: Path) -> None:
    featured(tmp_path, np.ones((3, 4)))
    file = tmp_path / "shard-000000.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert finished_shard(tmp_path, 0) is None
    file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(UserError, match=r"shard-000000\.npy is damaged"):
        open_dataset(tmp_path).features()
    assert [problem.shard for problem in verify(tmp_path).problems] == [0]


def test_some_samples_without_features_are_refused(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with ShardWriter(tmp_path, 0) as shard:
        shard.write(0, picture, 0, {}, features=np.ones(3))
        with pytest.raises(ValueError, match="some samples have features"):
            shard.write(1, picture, 0, {})
