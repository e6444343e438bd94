"""Conversions of tars that anyone may have made: every sample, or one line that says what is wrong."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ubgen.core.errors import UserError, Warned
from ubgen.dataset import ShardWriter, open_dataset, write_classes
from ubgen.dataset.tools.convert import Format, convert

FORMATS: tuple[Format, ...] = ("folder", "parquet", "webdataset")


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


def labels(out: Path, to: Format) -> list[int]:
    if to == "webdataset":
        return [sample.label for sample in open_dataset(out)]
    if to == "parquet":
        return [
            label
            for file in sorted(out.glob("*.parquet"))
            for label in pq.read_table(file)["label"].to_pylist()
        ]
    return [json.loads(line)["label"] for line in (out / "metadata.jsonl").read_text().splitlines()]


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
    assert labels(tmp_path / "out", to) == [2, 0, 2, 1]
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
    "no label": ([("b.jpg", jpeg())], r"has no \.cls, .* \(it has \.jpg\); add one"),
    "img2dataset": (
        [("b.jpg", jpeg()), ("b.txt", b"a cat"), ("b.json", b"{}")],
        r"has no \.cls, .*\(it has \.jpg, \.txt, \.json; captions, as img2dataset writes them, are no labels\)",
    ),
    "another image": ([("b.webp", b""), ("b.cls", b"0")], r"must have one image, .*\(it has \.webp, \.cls\)"),
    "not adjacent": (
        [("b.cls", b"0"), ("c.cls", b"0"), ("b.jpg", jpeg())],
        "do not follow each other.*--sort=name",
    ),
    "left behind": ([("b.jpg", jpeg()), ("b.cls", b"0"), ("a.json", b"{}")], "do not follow each other"),
    "dots": (
        [("b.v2.01.jpg", jpeg()), ("b.v2.01.cls", b"0")],
        r"extension '\.v2\.01\.jpg': .* the first dot",
    ),
    "dots in some": (
        [("b.jpg", jpeg()), ("b.cls", b"0"), ("b.2.jpg", jpeg()), ("b.2.cls", b"1")],
        r"extension '\.2\.jpg': .* the first dot",
    ),
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
        assert not (tmp_path / to).exists() or "JSON" in kind  # found before anything is written
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


CHANGED = {
    "header": (lambda data, place: data[: place + 3] + b"X" + data[place + 4 :], "is damaged at byte 2560"),
    "short": (lambda data, place: data[: place + 512 + 100], r"is not a readable tar \(unexpected end"),
    "text": (lambda data, place: b"this is not a tar", "is not a readable tar"),
    "nothing": (lambda data, place: b"", "is not a readable tar .empty file"),
    "cut between samples": (lambda data, place: data[:place], "is cut off at byte 2560"),
    "cut in a sample": (lambda data, place: data[: place + 512 + 1024], "is cut off at byte 4096"),
    "joined": (lambda data, place: data + data, "goes on after its end at byte .*cat"),
    "gzip": (lambda data, place: gzip.compress(data), "is compressed with gzip; expected a plain .tar"),
    "bzip2": (lambda data, place: bz2.compress(data), "is compressed with bzip2"),
    "xz": (lambda data, place: lzma.compress(data), "is compressed with xz"),
    "zstd": (lambda data, place: b"\x28\xb5\x2f\xfd" + bytes(100), "is compressed with zstd"),
    "zip": (lambda data, place: b"PK\x03\x04" + bytes(100), "is a zip archive"),
    "pointer": (
        lambda data, place: b"version https://git-lfs.github.com/spec/v1\n",
        "is a pointer of Git LFS",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_damaged_tars_are_refused(tmp_path: Path, change: str) -> None:
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"0")])
    path = source / "a.tar"
    data = path.read_bytes()
    changed, message = CHANGED[change]
    path.write_bytes(changed(data, data.index(b"b.jpg")))
    for to in FORMATS:
        with pytest.raises(UserError, match=rf"a\.tar {message}"):
            convert(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_tar_without_padding_is_whole(tmp_path: Path) -> None:
    source = foreign(tmp_path / "src" / "a.tar", GOOD)
    data = (source / "a.tar").read_bytes()
    (source / "a.tar").write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512) + bytes(1024))
    assert convert(source, tmp_path / "out", "folder") == (1, True)


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.tar.zst"])
def test_a_compressed_tar_beside_others_is_not_passed_over(tmp_path: Path, name: str) -> None:
    source = foreign(tmp_path / "src" / "a.TAR", GOOD)
    (source / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is compressed; unpack it"):
        convert(source, tmp_path / "out", "folder")
    (source / name).unlink()
    (source / "a.tar.md5").write_bytes(b"")
    assert convert(source, tmp_path / "out", "folder") == (1, True)


NAMES = [
    "BZh",
    "全角\u3000空白",
    "no-break\u00a0space",
    "\U0001f469\u200d\U0001f680",
    "__name",
    "x__",
    "a\\b",
    "\udce9t\udce9",
    "né/ñ",
]


def test_names_of_every_language_and_encoding(tmp_path: Path) -> None:
    """The bytes of Latin-1 names are not UTF-8; they come as lone surrogates."""
    members = [m for i, key in enumerate(NAMES) for m in ((f"{key}.jpg", jpeg()), (f"{key}.cls", b"%d" % i))]
    passed_over = [("LICENSE", b"MIT"), (".hidden.jpg", b""), ("__pycache__/a.pyc", b""), ("__meta__", b"")]
    source = foreign(tmp_path / "src" / "a.tar", [*members, *passed_over], errors="surrogateescape")
    assert convert(source, tmp_path / "out", "folder") == (len(NAMES), True)
    assert labels(tmp_path / "out", "folder") == list(range(len(NAMES)))


def test_a_directory_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such directory"):
        convert(tmp_path / "nothing", tmp_path / "out", "folder")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        convert(tmp_path / "nothing", tmp_path / "out", "folder")


def test_classes_that_are_too_few_are_found_before_anything_is_written(tmp_path: Path) -> None:
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"1")])
    write_classes(source, ["cat"], ["cat"], ["cat"])
    with pytest.raises(UserError, match=r"a sample has class 1; classes\.json has 1 classes, from 0"):
        convert(source, tmp_path / "out", "folder")
    assert not (tmp_path / "out").exists()


def test_classes_without_images_are_named_with_what_readers_need(tmp_path: Path) -> None:
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"3")])
    with pytest.warns(Warned, match=r"class 1 and 1 more have no images.*class_map='class_map.txt'"):
        convert(source, tmp_path / "out", "folder")
    timms = create_dataset("", str(tmp_path / "out"), class_map="class_map.txt")
    for data in (timms, ImageFolder(tmp_path / "out", allow_empty=True)):
        assert sorted(label for _, label in data) == [0, 3]


def test_json_of_an_earlier_conversion_is_fitted_too(tmp_path: Path) -> None:
    """Which took nulls over as they were."""
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("b.jpg", jpeg()), ("b.cls", b"0")])
    convert(source, tmp_path / "shards", "webdataset")
    with ShardWriter(tmp_path / "shards", 0) as writer:
        for position, caption in enumerate((None, "a cat")):
            writer.write(position, jpeg(), 0, {"caption": caption})
    with pytest.warns(Warned, match="JSON has 'caption' empty in some samples"):
        convert(tmp_path / "shards", tmp_path / "out", "webdataset")
    metas = [sample.meta for sample in open_dataset(tmp_path / "out")]
    assert metas == [{"class_index": 0}, {"class_index": 0, "caption": "a cat"}]


@pytest.mark.filterwarnings("ignore:the samples' JSON")
@pytest.mark.parametrize("to", FORMATS)
def test_json_of_any_depth_and_size_of_numbers(tmp_path: Path, to: Format) -> None:
    deep = b'{"a": ' + b"[" * 900 + b"]" * 900 + b', "b": 1e999, "prompt": null}'
    source = foreign(tmp_path / "src" / "a.tar", [*GOOD, ("a.json", deep)])
    assert convert(source, tmp_path / "out", to) == (1, True)
    if to == "folder":
        assert json.loads((tmp_path / "out" / "metadata.jsonl").read_text())["prompt"] == ""
