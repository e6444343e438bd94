"""The page: sections from directories, pictures within a limit, and the template."""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ubgen import __version__
from ubgen.core.errors import UserError, first_line
from ubgen.core.files import atomic_write
from ubgen.report.dataset import datasets
from ubgen.report.directories import Directory, Found, find
from ubgen.report.engine import engines
from ubgen.report.evaluation import evaluations
from ubgen.report.measures import measures
from ubgen.report.overview import overview
from ubgen.report.parts import Encoded, Part, Picture, Row, Section, Text
from ubgen.report.training import fine_tuning, pre_training

_STAGES = {
    "train": fine_tuning,
    "export": engines,
    "synth": datasets,
    "pretrain": pre_training,
    "eval": evaluations,
}
_ALL_PICTURES, _ONE_PICTURE, _LEAST = 2_000_000, 330_000, 4_000  # characters in the page
_ODD = (KeyError, IndexError, TypeError, ValueError, AttributeError)
_MARK = "<!-- made by ubgen-report -->"


def write_report(paths: Sequence[Path], out: Path, title: str, first: Sequence[Section] = ()) -> Found:
    """Write the report on `paths` to the file `out`, after the sections `first`; returns what was found there.

    An earlier report is replaced. UserError if `out` cannot be written or is another file, a path does not exist, or
    none of them is a finished stage directory.
    """
    _check(out)
    found = find(paths)
    atomic_write(out, render(found, title, first))
    return found


def _check(out: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: expected a file to write, in a directory that exists")
    if out.exists():
        with out.open("rb") as file:
            if _MARK.encode() not in file.read(200):
                raise UserError(f"--out {out} exists and is not a report; choose another --out, or remove it")


def render(found: Found, title: str, first: Sequence[Section] = ()) -> str:
    """The whole page as HTML, which needs no other file."""
    sections = list[Section]()
    for stage, write in _STAGES.items():
        if directories := found.of(stage):
            sections += _written(found, write, directories)
        if stage == "synth" and found.stats:
            sections.append(measures(found.stats))
    sections = [*first, overview(found), *sections]
    pictures = _encoded_pictures(sections)
    script = _asset("page.js")
    environment = Environment(
        loader=PackageLoader("ubgen.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        mark=Markup(_MARK),
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[_with_encoded(section, pictures) for section in sections],
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _written(
    found: Found, write: Callable[[Sequence[Directory]], Section], directories: Sequence[Directory]
) -> list[Section]:
    """The section on a stage; a directory that cannot be told about, of an earlier version, becomes a line."""
    try:
        return [write(directories)]
    except _ODD as error:
        together, whole = error, []
    for directory in directories:
        try:
            write([directory])
            whole.append(directory)
        except _ODD as error:
            reason = (
                f"its files are not what this version writes ({type(error).__name__}: {first_line(error)})"
            )
            found.others.append((directory.name, reason))
    if len(whole) == len(directories):
        raise together
    return [write(whole)] if whole else []


def _asset(name: str) -> str:
    return files("ubgen.report").joinpath(name).read_text(encoding="utf-8")


def _encoded_pictures(sections: Sequence[Section], most: int = _ALL_PICTURES) -> dict[int, Encoded | Text]:
    """By `id`. Where all together take more than `most` characters, the largest are made smaller until they fit."""
    pictures = [part for part in _all_parts(sections) if isinstance(part, Picture)]
    limit = _ONE_PICTURE
    made = [picture.encoded(limit) for picture in pictures]
    while sum(map(_size, made)) > most and limit > _LEAST:
        limit = limit * 2 // 3
        made = [
            picture.encoded(limit) if _size(old) > limit else old
            for picture, old in zip(pictures, made, strict=True)
        ]
    return {id(picture): one for picture, one in zip(pictures, made, strict=True)}


def _size(part: Encoded | Text) -> int:
    return len(part.address) if isinstance(part, Encoded) else 0


def _all_parts(sections: Sequence[Section]) -> Iterator[Part]:
    for section in sections:
        for part in section.parts:
            yield from part.parts if isinstance(part, Row) else (part,)
        yield from _all_parts(section.sections)


def _with_encoded(section: Section, pictures: Mapping[int, Part]) -> Section:
    def shown(part: Any) -> Any:
        return (
            Row([shown(inner) for inner in part.parts])
            if isinstance(part, Row)
            else pictures.get(id(part), part)
        )

    inner = [_with_encoded(one, pictures) for one in section.sections]
    return Section(section.title, [shown(part) for part in section.parts], inner)
