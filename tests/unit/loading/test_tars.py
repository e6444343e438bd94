"""Tars of others: the quick walk over their headers finds what `tarfile` finds."""

import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from ubgen.core.errors import UserError
from ubgen.loading.imageset import open_image_set
from ubgen.loading.tars import samples

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path: Path, names: list[str], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> Path:
    """A directory, then for each name an image of random bytes, its .cls and a .json."""
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            for ending, content in (
                ("jpg", os.urandom(100 + 137 * i % 1500)),
                ("cls", str(i % 1000).encode()),
                ("json", b"{}"),
            ):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size, info.mtime = len(content), mtime  # type: ignore[assignment]  # webdataset gives fractions
                tar.addfile(info, io.BytesIO(content))
    return path


def expected(path: Path) -> list[tuple[str, int, bytes]]:
    with tarfile.open(path) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar if info.isreg()}  # type: ignore[union-attr]
    keys = [name.removesuffix(".jpg") for name in content if name.endswith(".jpg")]
    return [(key, int(content[f"{key}.cls"]), content[f"{key}.jpg"]) for key in keys]


def found(path: Path) -> list[tuple[str, int, bytes]]:
    whole = path.read_bytes()
    with path.open("rb") as file:
        return [(s.key, s.label, whole[s.offset : s.offset + s.size]) for s in samples(file, "x", [".jpg"])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mtime", [0, 1.5])
@pytest.mark.parametrize("name", ["{}", "a/b/{}", "ü{}", "long/" * 25 + "{}", "{}" + "x" * 150, "./{}"])
def test_samples_are_those_that_tarfile_finds(tmp_path: Path, form: str, mtime: float, name: str) -> None:
    if form == "ustar" and "x" * 150 in name:
        pytest.skip("this form has no room for such names")
    path = write(tmp_path / "a.tar", [name.format(i) for i in range(5)], FORMS[form], mtime)
    assert found(path) == expected(path)
    assert len(found(path)) == 5


def test_more_samples_than_are_parsed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [f"{i:06d}" for i in range(3000)])
    assert found(path) == expected(path)


@pytest.mark.parametrize("cut", [512 * 3 + 100, 512 * 7 + 5])
def test_a_tar_that_was_cut_off_is_named(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.tar", ["1", "2", "3", "4"])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.tar is not a readable tar"):
        open_image_set(tmp_path)


@pytest.mark.parametrize("place", [2, 126, 150, 258])  # of the name, the size, the sum, and the magic
def test_a_damaged_header_is_named(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "a.tar", [str(i) for i in range(10)])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        content[tar.getmembers()[10].offset + place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is not a readable tar \(damaged header at byte"):
        open_image_set(tmp_path)


def test_a_wrong_index_beside_a_tar_does_no_harm(tmp_path: Path) -> None:
    """It is well formed, and gives the images' places in the opposite order."""
    path = write(tmp_path / "a.tar", ["1", "2", "3"])
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar if info.isreg()}
    lines = []
    for key, other in (("1", "3"), ("2", "2"), ("3", "1")):
        parts = [
            f"{ending} {places[f'{other}.{ending}'][0]} {places[f'{other}.{ending}'][1]} {key}.{ending}"
            for ending in ("jpg", "cls", "json")
        ]
        lines.append(" ".join(parts))
    (tmp_path / "a.idx").write_text("v1.2 3\n" + "\n".join(lines) + "\n")
    data = open_image_set(tmp_path)
    read = [(data.keys[i], int(data.labels[i]), data.read(i)) for i in range(3)]
    assert read == expected(path)


def test_plain_headers_are_read_several_times_faster_than_by_tarfile(tmp_path: Path) -> None:
    """One unusual name leaves the whole tar to `tarfile`."""
    plain = write(tmp_path / "plain.tar", [f"{i:06d}" for i in range(1000)], tarfile.GNU_FORMAT)
    other = write(tmp_path / "other.tar", [f"{i:06d}" for i in range(999)] + ["x" * 150], tarfile.GNU_FORMAT)
    times: dict[Path, list[float]] = {plain: [], other: []}
    for _ in range(3):
        for path, taken in times.items():
            begun = time.process_time()
            with path.open("rb") as file:
                assert sum(1 for _ in samples(file, "x", [".jpg"])) == 1000
            taken.append(time.process_time() - begun)
    assert 2 * min(times[plain]) < min(times[other])
