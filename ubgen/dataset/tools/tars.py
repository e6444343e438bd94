"""Reading WebDataset tars that anyone may have made.

Nothing is ever unpacked to a path: members are read one by one, and what is not a plain file with a plain name and a
sensible size is refused.
"""

import json
import math
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ubgen.core.errors import UserError
from ubgen.core.files import Store
from ubgen.dataset.tools.columns import Columns

IMAGES = {"jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_LARGEST = {"cls": 64, "json": 1 << 24}
_LARGEST_IMAGE = 1 << 28  # bytes; also of the header blocks, which tarfile reads whole
_CHUNK = 1 << 20
_NOT_TARS = {  # by regular expressions of their first bytes
    b"\x1f\x8b": "compressed with gzip",
    b"BZh[1-9](?:1AY&SY|\x17rE8P\x90)": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"version https://git-lfs": "a pointer of Git LFS",
}
_COMPRESSED = re.compile(
    r".+\.(?:tar\.(?:gz|bz2|xz|zstd?|lz4|lzma|z|zip|7z)|tgz|tbz2?|txz|tlz|tzst)", re.IGNORECASE
)
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")  # a name that shows as another one
_LEADS_OUT = re.compile(r"[/\\]|[A-Za-z]:[/\\]|(?:.*[/\\])?\.\.(?:[/\\].*)?$", re.DOTALL)


@dataclass(frozen=True)
class SourceSample:
    """One sample as it lies in a tar: `image` is encoded, `extension` jpg or png, `meta` the content of KEY.json."""

    key: str
    image: bytes
    extension: str
    label: int
    meta: dict[str, Any]
    position: int = 0
    """Its number in the conversion's output."""
    rejected: Sequence[Mapping[str, Any]] = ()
    """Ledger entries that are written with it."""


class _Member(NamedTuple):
    key: str
    extension: str
    info: tarfile.TarInfo


def read_samples(store: Store, name: str, skip: int = 0) -> Iterator[SourceSample]:
    """The samples of the tar `name` after the first `skip`, whose content is not read.

    UserError naming tar and member: for a member that is a link, a device or sparse, whose name is absolute, climbs
    with "..", or holds control characters, or that is too large; for a tar that is compressed, damaged, cut off or
    joined with another; for a sample without an image or a label.
    """
    where = store.address(name)
    with store.open(name) as file:
        for number, members in enumerate(_grouped(_members(file, where), where)):
            if number >= skip:
                yield _sample(file, members, where)


class Scanned(NamedTuple):
    labels: list[int]
    """Of every sample."""
    extensions: set[str]


def scan(store: Store, name: str, columns: Columns | None = None) -> Scanned:
    """Look through a tar, with the checks of `read_samples`, before anything is written.

    Of an image only the first bytes are read, and JSON only for `columns`.
    """
    where = store.address(name)
    found = Scanned([], set())
    with store.open(name) as file:
        for members in _grouped(_members(file, where), where):
            found.extensions.add(_extension(_image_member(file, members, where)))
            found.labels.append(_label(file, members, where))
            if columns is not None:
                columns.add(_meta(file, members, where))
    return found


def tar_names(store: Store) -> list[str]:
    """The tars in the directory; UserError where there are none, and where one is compressed."""
    names = [name for name in store.names() if not name.startswith(".")]
    if compressed := [name for name in names if _COMPRESSED.fullmatch(name)]:
        raise UserError(
            f"{store.address(compressed[0])} is compressed; unpack it to a plain .tar, and remove it"
        )
    if tars := [name for name in names if name.lower().endswith(".tar")]:
        return tars
    raise UserError(
        f"{store} holds no .tar file (directories in it are not searched); "
        "expected a ubgen dataset or a directory of WebDataset tars"
    )


class _Bounded:
    """A file that does not hand out more at once than any honest member needs."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_IMAGE:
            raise UserError(f"{self._where}: a header is too large; this is not a tar to trust")
        return self._file.read(size)


def _members(file: BinaryIO, where: str) -> Iterator[_Member]:
    try:
        # names in another encoding than UTF-8 come with surrogates in place of their bytes
        with tarfile.open(fileobj=_Bounded(file, where), mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]
            while info := tar.next():
                tar.members = []  # it would keep them all
                if member := _checked(info, where):
                    yield member
            _check_end(file, tar.offset, where)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        found = _other_kind(file) or f"not a readable tar ({_one_line(error)})"
        raise UserError(f"{where} is {found}; expected a plain .tar") from None


def _other_kind(file: BinaryIO) -> str | None:
    """What a file is that is not a tar, if that is easily said."""
    file.seek(0)
    start = file.read(32)
    return next((what for mark, what in _NOT_TARS.items() if re.match(mark, start)), None)


def _check_end(file: BinaryIO, end: int, where: str) -> None:
    """tarfile takes the end of the file, or a damaged header, for the end of the archive, and reads no further."""
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if not mark:
        raise UserError(f"{where} is cut off at byte {end}: the empty blocks that end a tar are missing")
    if mark.strip(b"\0"):
        raise UserError(f"{where} is damaged at byte {end}")
    while more := file.read(_CHUNK):
        if more.strip(b"\0"):
            raise UserError(
                f"{where} goes on after its end at byte {end}, as tars do that were joined with cat; "
                "give each tar by itself, or join them with tar --concatenate"
            )


def _checked(info: tarfile.TarInfo, where: str) -> _Member | None:
    """None for what WebDataset passes over: directories, hidden files, names without extension, and __meta__."""
    parts = info.name.split("/")
    shown = f"{where}: member {info.name[:100]!r}"
    if _LEADS_OUT.match(info.name):
        raise UserError(f"{shown} has a path that leads out of the archive; such a tar is not converted")
    if not info.name.isprintable() and _has_controls(info.name):
        raise UserError(f"{shown} has control characters in its name; such a tar is not converted")
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():
        raise UserError(f"{shown} is a link, a device or a sparse file; only plain files are converted")
    base, dot, extension = parts[-1].partition(".")
    if not base or not dot or re.match(r"__[^/]*__(?:[./]|$)", info.name):
        return None
    extension = extension.lower()
    if not 0 <= info.size <= _LARGEST.get(extension, _LARGEST_IMAGE):
        raise UserError(f"{shown} has {info.size} bytes, more than is sensible; such a tar is not converted")
    return _Member("/".join([*parts[:-1], base]), extension, info)


def _has_controls(name: str) -> bool:
    controls = ("Cc", "Zl", "Zp")
    return any(unicodedata.category(c) in controls for c in name) or bool(_DIRECTION.search(name))


def _grouped(members: Iterator[_Member], where: str) -> Iterator[dict[str, _Member]]:
    """Members that follow each other with the same key, by extension."""
    group: dict[str, _Member] = {}
    key = None
    for member in members:
        if member.key != key and group:
            yield group
            group = {}
        key = member.key
        if member.extension in group:
            raise UserError(f"{where}: member {member.info.name[:100]!r} comes twice")
        group[member.extension] = member
    if group:
        yield group


def _sample(file: BinaryIO, members: dict[str, _Member], where: str) -> SourceSample:
    image = _image_member(file, members, where)
    data = _content(file, image, where)
    label, meta = _label(file, members, where), _meta(file, members, where)
    return SourceSample(image.key, data, _extension(image), label, meta)


def _extension(image: _Member) -> str:
    return "jpg" if image.extension == "jpeg" else image.extension


def _image_member(file: BinaryIO, members: dict[str, _Member], where: str) -> _Member:
    """The image of a sample that has one, and a label."""
    images = [members[extension] for extension in IMAGES if extension in members]
    if len(images) != 1 or "cls" not in members or _inner_samples(members):
        key = next(iter(members.values())).key
        raise UserError(f"{where}: sample {key[:100]!r} {_wrong(file, members, where)}")
    mark = IMAGES[images[0].extension]
    if _read(file, images[0], len(mark)) != mark:
        raise UserError(f"{where}: member {images[0].info.name[:100]!r} is not the image that its name says")
    return images[0]


def _inner_samples(members: Mapping[str, _Member]) -> list[str]:
    """Extensions of images that have a label of their own: "2.jpg" beside "2.cls"."""
    return [
        name
        for name in members
        if "." in name and f"{name.rpartition('.')[0]}.cls" in members and _is_image(name)
    ]


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGES


def _wrong(file: BinaryIO, members: Mapping[str, _Member], where: str) -> str:
    """Why a sample is not one, from the most particular reason to the plainest."""
    have = ", ".join(f".{extension[:20]}" for extension in members)
    key = next(iter(members.values())).key
    dotted = _inner_samples(members) or [name for name in members if "." in name and _is_image(name)]
    if dotted and (_inner_samples(members) or not any(map(IMAGES.__contains__, members))):
        return (
            f"has the file extension {'.' + dotted[0][:40]!r}: WebDataset's extension starts at the first dot of the "
            "name; give the samples names without dots"
        )
    file.seek(0)
    if (
        sum(1 for group in _grouped(_members(file, where), where) if next(iter(group.values())).key == key)
        > 1
    ):
        return f"has members that do not follow each other ({have} first); pack the tar again, with tar --sort=name"
    if sum(map(IMAGES.__contains__, members)) != 1:
        return f"must have one image, .jpg or .png (it has {have})"
    captions = "; captions, as img2dataset writes them, are no labels" if "txt" in members else ""
    return f"has no .cls, the class index as text (it has {have}{captions}); add one to every sample"


def _label(file: BinaryIO, members: dict[str, _Member], where: str) -> int:
    text = _content(file, members["cls"], where).strip()
    if not text.isdigit() or len(text) > 7:
        raise UserError(
            f"{where}: sample {members['cls'].key[:100]!r} has .cls {text[:20]!r}; it must be the class index as text"
        )
    return int(text)


def _meta(file: BinaryIO, members: dict[str, _Member], where: str) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        meta = json.loads(
            _content(file, members["json"], where), parse_constant=lambda _: None, parse_float=_finite
        )
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{where}: member {members['json'].info.name[:100]!r} is not a JSON object")
    return meta


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _content(file: BinaryIO, member: _Member, where: str) -> bytes:
    data = _read(file, member, member.info.size)
    if len(data) != member.info.size:
        raise UserError(f"{where} ends in the middle of member {member.info.name[:100]!r}")
    return data


def _read(file: BinaryIO, member: _Member, count: int) -> bytes:
    """The first `count` bytes of a member, fewer where it is shorter."""
    place = file.tell()
    file.seek(member.info.offset_data)
    data = file.read(min(count, member.info.size))
    file.seek(place)
    return data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
