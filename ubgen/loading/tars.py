"""The samples of a WebDataset tar, from its headers and `.cls` members. Nothing of the images is read.

`tarfile` takes two minutes for the headers of 1.3 million samples, so the plain ones, which nearly all are, are read
here. A tar with any other header (long names, sizes beyond 8 GB, damage) is left to `tarfile`. Both check the sums.
"""

import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from ubgen.core.errors import UserError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FILE, _FILE_OF_OLD, _DIRECTORY, _EXTENDED = b"0"[0], 0, b"5"[0], b"x"[0]
_TOGETHER = 4096  # headers that are parsed at once


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """`offset` and `size` of its image."""

    key: str
    label: int
    offset: int
    size: int


class _Unusual(Exception):
    """A tar for `tarfile`."""


def samples(file: BinaryIO, where: str, endings: Iterable[str]) -> Iterator[Sample]:
    """What members of one key make up: one image, whose name has one of the `endings`, and `.cls`.

    UserError, naming the tar as `where`, for a file that is no whole tar, and for a sample without image or label.
    """
    images = {ending.removeprefix(".") for ending in endings}
    for key, members in _groups(_members(file, where)):
        found = [member for ending, member in members.items() if ending in images]
        if len(found) != 1:
            raise UserError(f"{where}: sample {key[:100]!r} must have one image, and has {len(found)}")
        yield Sample(key, _label(file, key, members.get("cls"), where), found[0].offset, found[0].size)


def _groups(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members that follow each other with the same key, by ending. The key ends at the first dot of the file's name."""
    key, group = "", dict[str, Member]()
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem or stem.startswith("__"):
            continue
        this = folder + slash + stem
        if this != key and group:
            yield key, group
            group = {}
        key, group[ending.lower()] = this, member
    if group:
        yield key, group


def _label(file: BinaryIO, key: str, member: Member | None, where: str) -> int:
    if member is None:
        raise UserError(f"{where}: sample {key[:100]!r} has no .cls, the class index as text")
    file.seek(member.offset)
    text = file.read(min(member.size, 16)).strip()
    if not text.isdigit() or len(text) > 7:
        raise UserError(
            f"{where}: sample {key[:100]!r} has .cls {text!r}; it must be the class index as text"
        )
    return int(text)


def _members(file: BinaryIO, where: str) -> list[Member]:
    try:
        return _plain_members(file)
    except _Unusual:
        file.seek(0)
        return _members_by_tarfile(file, where)


def _plain_members(file: BinaryIO) -> list[Member]:
    """Of a tar whose headers are all of the plain form (POSIX.1-1988 "ustar"); see `tar(5)` for the fields."""
    found, position, end = list[Member](), 0, file.seek(0, 2)
    while position < end:
        headers, places = list[bytes](), list[tuple[int, int]]()
        while position < end and len(headers) < _TOGETHER:
            file.seek(position)
            if (header := file.read(_BLOCK)) == _ZEROS:
                position = end
                break
            try:
                size = int(header[124:135], 8)
            except ValueError:
                raise _Unusual from None
            headers.append(header)
            places.append((position + _BLOCK, size))
            position += _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if headers:
            found += _parsed(file, headers, places)
    if position > end or not found:  # cut off, or nothing
        raise _Unusual
    return found


def _parsed(file: BinaryIO, headers: list[bytes], places: list[tuple[int, int]]) -> Iterator[Member]:
    if len(headers[-1]) < _BLOCK:
        raise _Unusual
    fields = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    _check(fields)
    names = np.ascontiguousarray(fields[:, :100]).view("S100")[:, 0].tolist()
    for i in np.flatnonzero((fields[:, 345] != 0) & (fields[:, 262] == 0)):  # 262: GNU's form has no prefix
        names[i] = headers[i][345:500].rstrip(b"\0") + b"/" + names[i]
    for name, kind, (start, size) in zip(names, fields[:, 156].tolist(), places, strict=True):
        if kind in (_FILE, _FILE_OF_OLD) and not name.endswith(b"/"):
            yield Member(name.decode("utf-8", "surrogateescape"), start, size)
        elif kind == _EXTENDED:
            file.seek(start)
            _require_times_only(file.read(min(size, 1 << 16)))
        elif kind != _DIRECTORY:
            raise _Unusual


def _check(fields: np.ndarray) -> None:
    """Magic, the end of the size, and the sum of a header's bytes, with blanks for the sum itself."""
    digits = fields[:, 148:154].astype(np.int64) - ord("0")
    sums = fields.sum(1, dtype=np.int64) - fields[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    holds = (
        (fields[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(),
        np.isin(fields[:, 135], (0, ord(" "))).all(),
        ((digits >= 0) & (digits < 8)).all(),
        (digits @ 8 ** np.arange(5, -1, -1) == sums).all(),
    )
    if not all(holds):
        raise _Unusual


def _require_times_only(extended: bytes) -> None:
    """Extended headers often say only when a file was written, to fractions of a second."""
    keywords = {line.partition(b"=")[0].rpartition(b" ")[2] for line in extended.splitlines()}
    if not keywords <= {b"mtime", b"atime", b"ctime"}:
        raise _Unusual


def _members_by_tarfile(file: BinaryIO, where: str) -> list[Member]:
    found = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if info.isreg():
                    found.append(Member(info.name, info.offset_data, info.size))
            file.seek(tar.offset)
            if file.read(_BLOCK) not in (b"", _ZEROS):  # tarfile stops there, and says nothing
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise UserError(f"{where} is not a readable tar ({' '.join(str(error).split())})") from None
    return found
