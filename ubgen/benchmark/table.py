"""A table of figures that the terminal and a Markdown file both show."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ubgen.core.console import markdown_table
from ubgen.core.console import table as drawn
from ubgen.core.files import atomic_write


@dataclass
class Table:
    """Cells are text already; the first `text_columns` columns are words, the rest numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    text_columns: int = 2
    note: str = ""

    def markdown(self) -> str:
        """A heading, the table, and the note below it."""
        table = markdown_table(self.columns, self.rows, text_columns=self.text_columns)
        return "\n\n".join(part for part in (f"## {self.title}", table, self.note) if part) + "\n"

    def show(self, console: Console) -> None:
        """The table in the terminal, its note below."""
        console.print(drawn(self.title, self.columns, self.rows, text_columns=self.text_columns))
        console.print(self.note, highlight=False, markup=False)


READING = "## Reading"
"""The heading of what people write below the figures."""


def write_page(path: Path, text: str) -> None:
    """Markdown; what stands below `READING` in the file was written by hand, and is kept."""
    former = path.read_text(encoding="utf-8") if path.is_file() else ""
    reading = former[former.index(READING) :] if READING in former else ""
    atomic_write(path, text.rstrip("\n") + "\n" + (f"\n{reading}" if reading else ""))


def write_result(out: Path, name: str, content: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """NAME.json and NAME.md into the directory `out`, as `write_page` does."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{name}.json", json.dumps(content, indent=2) + "\n")
    write_page(out / f"{name}.md", "\n".join(table.markdown() for table in tables))


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
