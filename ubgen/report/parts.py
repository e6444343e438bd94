"""What a report is made of: sections of tables, charts, pictures and sentences. All text in them is plain text."""

import base64
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup
from PIL import Image

from ubgen.core.errors import first_line

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?(?: ?%| dB| \(.*\))?", re.IGNORECASE)
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_WIDTHS = (1000, 800, 640, 480, 360, 240)
_QUALITY = 82


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar = "text"


@dataclass(frozen=True)
class Table:
    """The first column names the row. `folded`: behind a line that opens it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False
    kind: ClassVar = "table"

    @cached_property
    def numeric(self) -> list[bool]:
        """Of each column, whether its cells begin with numbers, by which it is sorted."""
        cells = [[row[i] for row in self.rows if row[i]] for i in range(len(self.columns))]
        return [bool(column) and all(map(_NUMBER.fullmatch, column)) for column in cells]

    @staticmethod
    def shown(cell: str) -> str:
        """In the page a hash is cut to its first 12 digits; the download has all of it."""
        return f"{cell[:19]}…" if _HASH.fullmatch(cell) else cell

    @property
    def file(self) -> str:
        """The name of its download."""
        return re.sub(r"[^a-z0-9]+", "-", self.caption.lower()).strip("-")[:60] + ".csv"

    @property
    def csv(self) -> str:
        """The table as a data address. A text that a spreadsheet would take for a formula gets a quote before it."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerows([_harmless(cell) for cell in row] for row in (self.columns, *self.rows))
        return _address("text/csv;charset=utf-8", out.getvalue().encode("utf-8", "replace"))


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell) else cell


@dataclass(frozen=True)
class Picture:
    """An image file, or an image. `alt` says what is to be seen."""

    image: Path | Image.Image
    caption: str
    alt: str
    kind: ClassVar = "picture"

    def encoded(self, limit: int) -> "Encoded | Text":
        """As WebP that takes at most `limit` characters, if its width need not fall below 240 pixels for that."""
        try:
            return self._encoded(limit)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return Text(f"{self.caption}: the picture cannot be shown ({first_line(error)}).")

    def _encoded(self, limit: int) -> "Encoded":
        image = (Image.open(self.image) if isinstance(self.image, Path) else self.image).convert("RGB")
        data = b""
        for width in _WIDTHS:
            if width < image.width:
                height = max(1, round(image.height * width / image.width))
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            elif data:
                continue
            data = _webp(image)
            if len(data) * 4 / 3 + 30 <= limit:
                break
        return Encoded(_address("image/webp", data), image.width, image.height, self.caption, self.alt)


@dataclass(frozen=True)
class Encoded:
    """A picture, ready for the page."""

    address: str
    width: int
    height: int
    caption: str
    alt: str
    kind: ClassVar = "encoded"


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Chart:
    """Markup of ubgen.report.charts."""

    caption: str
    svg: Markup
    kind: ClassVar = "chart"


@dataclass(frozen=True)
class Row:
    """Small pictures or charts beside each other."""

    parts: Sequence[Picture | Chart | Encoded | Text]
    kind: ClassVar = "row"


Part = Text | Table | Picture | Encoded | Chart | Row


@dataclass
class Section:
    """Of the page, or of another section."""

    title: str
    parts: list[Part] = field(default_factory=list)
    sections: list["Section"] = field(default_factory=list)


def number(value: Any) -> str:
    """A figure for a table: four significant digits, or what it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as ("rollout.steps", "25")."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "not set" if value is None else str(value)
