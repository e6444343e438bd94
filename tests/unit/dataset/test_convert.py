"""Conversions: the same samples in every layout, resumable, and safe whatever a tar holds."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ubgen.core.errors import UserError, Warned
from ubgen.core.locks import hold
from ubgen.dataset import open_dataset, open_store
from ubgen.dataset.tools.convert import Format, convert
from ubgen.dataset.tools.formats import directory_names, unique_names
from ubgen.dataset.tools.verify import verify

Make = Callable[..., Path]
FORMATS: tuple[Format, ...] = ("folder", "parquet", "webdataset")


def content(out: Path, to: Format) -> list[tuple[str, int, bytes, str]]:
    """Key, label, stored image and prompt of every sample of a conversion, in order."""
    if to == "webdataset":
        dataset = open_dataset(out)
        return [
            (f"{i:09d}", sample.label, dataset.encoded(i)[0], sample.meta["prompt"])
            for i, sample in enumerate(dataset)
        ]
    if to == "parquet":
        rows = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        return [(row["key"], row["label"], row["image"]["bytes"], row["prompt"]) for row in rows]
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return [
        (Path(s["file_name"]).stem, s["label"], (out / s["file_name"]).read_bytes(), s["prompt"])
        for s in lines
    ]


@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.parametrize("to", FORMATS)
def test_the_same_samples_in_every_layout(
    tmp_path: Path, make: Make, hostile: list[str], to: Format, extension: str
) -> None:
    source = make(tmp_path / "d", hostile, shards=3, per_shard=10, extension=extension)
    seen: list[tuple[int, int]] = []
    assert convert(source, tmp_path / "out", to, 7, lambda done, total: seen.append((done, total))) == (
        30,
        True,
    )
    dataset = open_dataset(source)
    want = [(f"{i:09d}", s.label, dataset.encoded(i)[0], s.meta["prompt"]) for i, s in enumerate(dataset)]
    if to != "webdataset":  # lone surrogates cannot be stored as UTF-8
        want = [(*row[:3], row[3].encode(errors="replace").decode()) for row in want]
    assert content(tmp_path / "out", to) == want
    assert seen[0] == (0, 30)
    assert seen[-1] == (30, 30)
    assert {p.name for p in tmp_path.iterdir()} == {"d", "out"}
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == hostile
    assert "## Reading it" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_new_shards_are_a_whole_dataset_with_its_ledger(tmp_path: Path, make: Make) -> None:
    convert(make(tmp_path / "d"), tmp_path / "out", "webdataset", 5)
    result = verify(tmp_path / "out")
    assert result.problems == []
    assert (result.shards, result.images, result.rejected) == (3, 12, 2)
    scores = [(e.key, e.scores) for e in open_dataset(tmp_path / "out").entries()]
    assert scores == [(e.key, e.scores) for e in open_dataset(tmp_path / "d").entries()]


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_conversion_continues(tmp_path: Path, make: Make, to: Format) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Stop

    source, out, straight = make(tmp_path / "d"), tmp_path / "out", tmp_path / "straight"
    with pytest.raises(Stop):
        convert(source, out, to, 4, stop)
    assert not (out / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".jpg", ".parquet", ".tar")}
    assert len(kept) == {"folder": 8, "parquet": 2, "webdataset": 2}[to]
    if to == "folder":
        (out / "n000" / "000000010.jpg").write_bytes(b"torn by a kill")
    assert convert(source, out, to, 4) == (12, True)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    convert(source, straight, to, 4)
    assert tree(out) == tree(straight)


def tree(out: Path) -> dict[str, bytes]:
    """The manifest holds the time."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


def test_a_damaged_part_is_made_again(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    convert(source, out, "parquet", 4)
    (out / "manifest.json").unlink()
    part = out / "train-00001-of-00003.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    convert(source, out, "parquet", 4)
    assert part.read_bytes() == whole


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not a directory of ubgen-dataset convert \(it holds photos\)"):
        convert(source, out, "folder")
    (out / "photos").rmdir()
    convert(source, out, "folder")
    with pytest.raises(
        UserError, match=r"a finished run with another configuration .shard_size was 1000, now 3"
    ):
        convert(source, out, "folder", 3)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"an unfinished run .*to was 'folder', now 'parquet'.*another OUT"):
        convert(source, out, "parquet")
    with pytest.raises(UserError, match="the dataset itself"):
        convert(source, source, "folder")
    with pytest.raises(UserError, match="--shard-size"):
        convert(source, tmp_path / "new", "folder", 0)


def test_a_finished_conversion_is_left_as_it_is(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    convert(source, out, "folder")
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    assert convert(source, out, "folder") == (12, False)
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_shards_made_anew_are_a_source_again(tmp_path: Path, make: Make) -> None:
    convert(make(tmp_path / "d"), tmp_path / "shards", "webdataset", 5)
    convert(tmp_path / "d", tmp_path / "straight", "parquet")
    convert(tmp_path / "shards", tmp_path / "out", "parquet")
    assert content(tmp_path / "out", "parquet") == content(tmp_path / "straight", "parquet")
    with pytest.raises(UserError, match="is a conversion to parquet; expected WebDataset shards"):
        convert(tmp_path / "out", tmp_path / "again", "folder")


def test_only_one_converts_at_a_time(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    out.mkdir()
    with hold(open_store(out)), pytest.raises(UserError, match="another process is writing"):
        convert(source, out, "folder")
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_an_unfinished_or_damaged_source_is_refused(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path / "d")
    (source / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        convert(source, tmp_path / "out", "folder")
    assert not (tmp_path / "out").exists()


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def foreign(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], **options: Any) -> Path:
    """A tar of a directory of its own; a TarInfo takes the place of a plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data, io.BytesIO(b"\0" * data.size))
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path.parent


@pytest.mark.parametrize("to", FORMATS)
def test_tars_of_others(tmp_path: Path, to: Format) -> None:
    """Directories in names, other members, long names in either extension, and labels with gaps are all usual."""
    long = "train/" + "long" * 60
    directory = tarfile.TarInfo("train")
    directory.type = tarfile.DIRTYPE
    members = [("train", directory)]
    for key, label in (("train/b", 2), (long, 0), ("./c", 2)):
        members += [
            (f"{key}.JPG", jpeg(label)),
            (f"{key}.cls", b"%d\n" % label),
            (f"{key}.txt", b"a caption"),
        ]
        members += [(f"{key}.json", b'{"prompt": "p", "quality": NaN, "flag": 3}')]
    source = foreign(tmp_path / "src" / "a.tar", members, format=tarfile.GNU_FORMAT)
    foreign(tmp_path / "src" / "b.tar", [("d.cls", b"1"), ("d.jpg", jpeg(9))], format=tarfile.PAX_FORMAT)
    assert convert(source, tmp_path / "out", to, 3) == (4, True)
    if to == "webdataset":
        labels = [s.label for s in open_dataset(tmp_path / "out")]
    else:
        labels = [row[1] for row in content(tmp_path / "out", to)]
    assert labels == [2, 0, 2, 1]
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out"}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


GOOD = [("a.jpg", jpeg()), ("a.cls", b"0")]
BAD: dict[str, tuple[list[tuple[str, bytes | tarfile.TarInfo]], str]] = {
    "climbs": ([("../../evil.jpg", jpeg()), ("../../evil.cls", b"0")], "leads out of the archive"),
    "climbs inside": ([("a/../../evil.jpg", jpeg())], "leads out of the archive"),
    "absolute": ([("/tmp/evil.jpg", jpeg())], "leads out of the archive"),
    "backslash": ([("..\\evil.jpg", jpeg())], "leads out of the archive"),
    "newline": ([("a\nb.jpg", jpeg())], "control characters"),
    "direction": ([("\u202egpj.jpg", jpeg())], "control characters"),
    "symlink": ([("b.jpg", member("b.jpg", tarfile.SYMTYPE, "/etc/passwd"))], "is a link"),
    "hardlink": ([("b.jpg", member("b.jpg", tarfile.LNKTYPE, "a.jpg"))], "is a link"),
    "device": ([("b.jpg", member("b.jpg", tarfile.CHRTYPE))], "a device"),
    "fifo": ([("b.jpg", member("b.jpg", tarfile.FIFOTYPE))], "a device"),
    "huge text": ([("b.cls", member("b.cls", size=65))], "more than is sensible"),
    "twice": ([("b.jpg", jpeg()), ("b.jpg", jpeg())], "comes twice"),
    "two images": ([("b.jpg", jpeg()), ("b.png", b""), ("b.cls", b"0")], "must have one image"),
    "no image": ([("b.cls", b"0")], "must have one image"),
    "no label": ([("b.jpg", jpeg())], "has no .cls"),
    "large label": ([("b.jpg", jpeg()), ("b.cls", b"9999999")], "so many classes need a classes.json"),
    "strange label": ([("b.jpg", jpeg()), ("b.cls", b"-1")], "must be the class index"),
    "no JPEG": ([("b.jpg", b"GIF89a"), ("b.cls", b"0")], "is not the image"),
    "no JSON": ([("b.jpg", jpeg()), ("b.cls", b"0"), ("b.json", b"[1]")], "is not a JSON object"),
    "deep JSON": ([("b.jpg", jpeg()), ("b.cls", b"0"), ("b.json", b"[" * 10**5)], "is not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_hostile_members_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    members, message = BAD[kind]
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, *members])
    for to in FORMATS:
        with pytest.raises(UserError, match=message) as caught:
            convert(source, tmp_path / to, to)
        assert str(source) in str(caught.value)
        assert str(caught.value).isprintable()
    assert {p.name for p in tmp_path.rglob("*") if "evil" in p.name} == set()
    assert {p.name for p in tmp_path.iterdir()} <= {"src", *FORMATS}


def test_a_huge_or_false_size_is_refused(tmp_path: Path) -> None:
    header = member("b.jpg", size=2**40).tobuf(tarfile.GNU_FORMAT)
    source = foreign(tmp_path / "src" / "a.tar", GOOD)
    whole = (source / "a.tar").read_bytes()
    whole = whole[: whole.index(b"a.cls") + 1024]
    (source / "a.tar").write_bytes(whole + header)
    with pytest.raises(UserError, match="1099511627776 bytes, more than is sensible"):
        convert(source, tmp_path / "out", "folder")
    (source / "a.tar").write_bytes(whole + member("b.jpg", size=10**6).tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match=r"a\.tar"):
        convert(source, tmp_path / "out", "folder")


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """A long-name header states how much of the file is the name; the file here is a hole of 300 MB."""
    path = tmp_path / "src" / "a.tar"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(
            member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=300 << 20).tobuf(tarfile.GNU_FORMAT)
        )
        file.truncate(301 << 20)
    with pytest.raises(UserError, match="a header is too large"):
        convert(path.parent, tmp_path / "out", "folder")


@pytest.mark.parametrize("damage", ["header", "short", "text", "gzip"])
def test_damaged_tars_are_refused(tmp_path: Path, damage: str) -> None:
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"0")])
    path = source / "a.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"b.jpg")
    changed = {
        "header": data[: place + 3] + b"X" + data[place + 4 :],
        "short": data[: place + 512 + 100],
        "text": b"this is not a tar",
        "gzip": b"\x1f\x8b\x08" + bytes(1000),
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"a\.tar"):
        convert(source, tmp_path / "out", "folder")


def test_a_directory_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        convert(tmp_path / "nothing", tmp_path / "out", "folder")


@settings(deadline=None)  # the first call imports timm
@given(
    st.lists(
        st.one_of(st.text(max_size=5), st.from_regex(r"[a-cA-C]?[0-9]{1,3}", fullmatch=True)), max_size=30
    )
)
def test_directories_sort_as_the_labels(ids: list[str]) -> None:
    from timm.data.readers.reader_image_folder import natural_key

    names = directory_names(ids)
    assert len({name.lower() for name in names}) == len(ids)
    assert names == sorted(names) == sorted(names, key=natural_key)


def test_classes_without_images_are_named_with_what_readers_need(tmp_path: Path) -> None:
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"3")])
    with pytest.warns(Warned, match=r"class 1 and 1 more have no images.*class_map='class_map.txt'"):
        convert(source, tmp_path / "out", "folder")
    timms = create_dataset("", str(tmp_path / "out"), class_map="class_map.txt")
    for data in (timms, ImageFolder(tmp_path / "out", allow_empty=True)):
        assert sorted(label for _, label in data) == [0, 3]


def test_ids_that_sort_well_stay_as_they_are() -> None:
    assert directory_names(["n01440764", "n01443537", "n02000000"]) == ["n01440764", "n01443537", "n02000000"]
    assert directory_names(["n2", "n10"]) == ["0_n2", "1_n10"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=3), max_size=10))
def test_label_names_differ(names: list[str]) -> None:
    classes = [{"name": name, "id": str(i % 2)} for i, name in enumerate(names)]
    assert len(set(unique_names(classes))) == len(names)
