"""USTAR members, as `tarfile` writes them but quicker: only name, size and checksum differ between headers.

IEEE Std 1003.1, pax, "ustar Interchange Format".
"""

import tarfile

BLOCK = tarfile.BLOCKSIZE
_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_AFTER_NAME = _EMPTY[100:124]
_AFTER_CHECKSUM = _EMPTY[156:]
# the checksum counts its own field as spaces; empty name, and no size
_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[136:148]) + 8 * ord(" ") + sum(_AFTER_CHECKSUM)
_MTIME = _EMPTY[136:148]
_ZEROS = bytes(BLOCK)
_RECORD = tarfile.RECORDSIZE


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> list[bytes]:
    """Header, content and padding of a regular file. `name` is ASCII and at most 100 bytes, `data` under 8 GiB."""
    path = name.encode("ascii")
    size = b"%011o\0" % len(data)
    if len(path) > 100 or len(size) > 12:
        raise ValueError(f"{name}: name or content is too long for a tar header")
    checksum = _SUM + sum(path) + sum(size)
    header = b"".join(
        (path.ljust(100, b"\0"), _AFTER_NAME, size, _MTIME, b"%06o\0 " % checksum, _AFTER_CHECKSUM)
    )
    return [header, data, _ZEROS[: -len(data) % BLOCK]]


def archive_end(offset: int) -> bytes:
    """What closes an archive of `offset` bytes: two empty blocks, and zeros up to a whole record."""
    return bytes(-(offset + 2 * BLOCK) % _RECORD + 2 * BLOCK)
