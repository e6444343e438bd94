"""The samples' JSON of other makers, made such that one table with typed columns holds it.

Hugging Face `datasets` takes the columns, and their types, from the first five samples of the first shard. On a value
of another type it fails later, or turns 1.5 into 1 without a word.
"""

import json
from collections.abc import Callable
from typing import Any

from ubgen.core.errors import warn
from ubgen.dataset.text import plain

_EMPTY = {"null", "empty list"}
_NO_COLUMN = {"large integer", "deep nesting"}
_DEEPEST = 32
_TYPES: dict[type, str] = {type(None): "null", bool: "bool", float: "float", str: "text", dict: "object"}
_NAMED = 3


class _Kind:
    """The types of all values that a field has in the dataset; of lists the items', of objects the fields'."""

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.items: _Kind | None = None
        self.fields: dict[str, _Kind] = {}

    def add(self, value: Any, depth: int = 0) -> None:
        self.types.add(_type(value))
        if depth > _DEEPEST:
            self.types.add("deep nesting")
        elif isinstance(value, dict):
            for name, inner in value.items():
                self.fields.setdefault(name, _Kind()).add(inner, depth + 1)
        elif isinstance(value, list) and value:
            self.items = self.items or _Kind()
            for inner in value:
                self.items.add(inner, depth + 1)

    def is_column(self, optional: bool = True) -> bool:
        """Whether values of one type are left when empty ones of an `optional` field are left out."""
        known = self.types - _EMPTY
        if (len(known) > 1 and known != {"integer", "float"}) or known & _NO_COLUMN:
            return False
        if known and known != self.types and not optional:
            return False
        inner = all(kind.is_column() for kind in self.fields.values())
        return inner and (self.items is None or self.items.is_column(optional=False))

    def leaves_out(self, value: Any) -> bool:
        """A null shows no type, and an empty list not that of its items."""
        return len(self.types) > 1 and _type(value) in _EMPTY

    def fitted(self, value: Any) -> Any:
        if isinstance(value, dict):
            fields = ((name, self.fields[name], inner) for name, inner in value.items())
            return {_text(n): kind.fitted(inner) for n, kind, inner in fields if not kind.leaves_out(inner)}
        if isinstance(value, list):
            return [self.items.fitted(inner) for inner in value] if self.items else value
        if isinstance(value, str):
            return _text(value)
        return float(value) if "float" in self.types and _type(value) == "integer" else value


class Columns:
    """The fields of the samples' JSON, without those named in `without`, which are left as they are."""

    def __init__(self, without: set[str]) -> None:
        self._without = without
        self._fields: dict[str, _Kind] = {}

    def add(self, meta: dict[str, Any]) -> None:
        for name, value in meta.items():
            if name not in self._without:
                self._fields.setdefault(name, _Kind()).add(value)

    def fitted(self, meta: dict[str, Any]) -> dict[str, Any]:
        """`meta` of a sample that was added: a field of several types as text, and no null in a field of a type."""
        fitted = {}
        for name, value in meta.items():
            kind = self._fields.get(name)
            if kind is None:
                fitted[name] = value
            elif kind.is_column():
                if not kind.leaves_out(value):
                    fitted[_text(name)] = kind.fitted(value)
            elif value is not None:
                fitted[_text(name)] = _text(value if isinstance(value, str) else json.dumps(value))
        return fitted

    def tell(self) -> None:
        """Warn of the fields that `fitted` changes."""
        if several := self._named(lambda kind: not kind.is_column()):
            warn(
                f"the samples' JSON has values in {several} that no column of one type holds; they become text"
            )
        if left_out := self._named(lambda kind: kind.is_column() and _has_gaps(kind)):
            warn(f"the samples' JSON has {left_out} empty in some samples; there the field is left out")

    def _named(self, wanted: Callable[[_Kind], bool]) -> str:
        names = [repr(plain(name, 40)) for name, kind in sorted(self._fields.items()) if wanted(kind)]
        more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
        return ", ".join(names[:_NAMED]) + more


def _has_gaps(kind: _Kind) -> bool:
    gaps = len(kind.types) > 1 and bool(kind.types & _EMPTY)
    inner = [*kind.fields.values(), *([kind.items] if kind.items else [])]
    return gaps or any(map(_has_gaps, inner))


def _type(value: Any) -> str:
    if isinstance(value, list):
        return "list" if value else "empty list"
    if type(value) is int:
        return "integer" if -(2**63) <= value < 2**63 else "large integer"
    return _TYPES[type(value)]


def _text(text: str) -> str:
    """Lone surrogates cannot be stored as UTF-8."""
    return text.encode(errors="replace").decode()
