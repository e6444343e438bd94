"""Reading WebDataset tars that anyone may have made.

Nothing is ever unpacked to a path: members are read one by one, and what is not a plain file with a plain name and a
sensible size is refused.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ubgen.core.errors import UserError
from ubgen.core.files import Store

IMAGES = {"jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_LARGEST = {"cls": 64, "json": 1 << 24}
_LARGEST_IMAGE = 1 << 28  # bytes; also of the header blocks, which tarfile reads whole


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
    with "..", or holds control characters, or that is too large; for a damaged tar; for a sample without an image or a
    label.
    """
    with store.open(name) as file:
        for number, members in enumerate(_grouped(_members(file, store.address(name)), store.address(name))):
            if number >= skip:
                yield _sample(file, members, store.address(name))


def scan_labels(store: Store, name: str) -> list[int]:
    """The label of every sample of the tar, after the checks of `read_samples`; no image is read."""
    where = store.address(name)
    with store.open(name) as file:
        labels = []
        for members in _grouped(_members(file, where), where):
            _image_member(members, where)
            labels.append(_label(file, members, where))
        return labels


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
        with tarfile.open(fileobj=_Bounded(file, where), mode="r:") as tar:  # type: ignore[call-overload]
            while info := tar.next():
                tar.members = []  # it would keep them all
                if member := _checked(info, where):
                    yield member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise UserError(f"{where} is damaged at byte {tar.offset}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} is not a readable tar ({_one_line(error)})") from None


def _checked(info: tarfile.TarInfo, where: str) -> _Member | None:
    """None for what WebDataset passes over: directories, hidden files and the like."""
    parts = info.name.split("/")
    shown = f"{where}: member {info.name[:100]!r}"
    if info.name.startswith("/") or ".." in parts or "\\" in info.name:
        raise UserError(f"{shown} has a path that leads out of the archive; such a tar is not converted")
    if not info.name.isprintable():
        raise UserError(f"{shown} has control characters in its name; such a tar is not converted")
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():
        raise UserError(f"{shown} is a link, a device or a sparse file; only plain files are converted")
    base, _, extension = parts[-1].partition(".")
    if not base or base.startswith("__"):
        return None
    extension = extension.lower()
    if not 0 <= info.size <= _LARGEST.get(extension, _LARGEST_IMAGE):
        raise UserError(f"{shown} has {info.size} bytes, more than is sensible; such a tar is not converted")
    return _Member("/".join([*parts[:-1], base]), extension, info)


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
    image = _image_member(members, where)
    data = _content(file, image, where)
    if not data.startswith(IMAGES[image.extension]):
        raise UserError(f"{where}: member {image.info.name[:100]!r} is not the image that its name says")
    extension = "jpg" if image.extension == "jpeg" else image.extension
    return SourceSample(image.key, data, extension, _label(file, members, where), _meta(file, members, where))


def _image_member(members: dict[str, _Member], where: str) -> _Member:
    found = [members[extension] for extension in IMAGES if extension in members]
    if len(found) != 1:
        key = next(iter(members.values())).key
        raise UserError(f"{where}: sample {key[:100]!r} must have one image, .jpg or .png")
    return found[0]


def _label(file: BinaryIO, members: dict[str, _Member], where: str) -> int:
    key = next(iter(members.values())).key
    if "cls" not in members:
        raise UserError(f"{where}: sample {key[:100]!r} has no .cls, the class index as text")
    text = _content(file, members["cls"], where).strip()
    if not text.isdigit() or len(text) > 7:
        raise UserError(
            f"{where}: sample {key[:100]!r} has .cls {text[:20]!r}; it must be the class index as text"
        )
    return int(text)


def _meta(file: BinaryIO, members: dict[str, _Member], where: str) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        meta = json.loads(_content(file, members["json"], where), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{where}: member {members['json'].info.name[:100]!r} is not a JSON object")
    return meta


def _content(file: BinaryIO, member: _Member, where: str) -> bytes:
    place = file.tell()
    file.seek(member.info.offset_data)
    data = file.read(member.info.size)
    file.seek(place)
    if len(data) != member.info.size:
        raise UserError(f"{where} ends in the middle of member {member.info.name[:100]!r}")
    return data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
