"""A table of figures that the terminal and a Markdown file both show."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ubgen.core.console import markdown_table


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


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
