"""Class lists: the shipped ones by name, or the user's own text file."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError

_DATA = Path(__file__).resolve().parents[1] / "data" / "classes"
_MAX_FILE_NAME_BYTES = 100
_WNID_LINE = re.compile(r"(n\d{8})[ ,]+(\S.*)")
# of tables that people export
_HEADER_WORDS = {"id", "class", "class_id", "class_name", "index", "label", "name", "synset", "wnid"}
_FORM = 'write one class per line, "id<TAB>name" or just the name'


@dataclass(frozen=True)
class ClassList:
    """Classes in label order. Ids are distinct and safe in file names; names are the prompts and may repeat."""

    ids: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def compared(name: str) -> str:
    """What two class names are compared by: case and spacing do not count, as CLIP reads neither."""
    return " ".join(name.lower().split())


def shipped_lists() -> list[str]:
    """Names that `load_classes` knows without a file."""
    return sorted(path.stem for path in _DATA.glob("*.txt"))


def load_classes(name_or_path: str | Path) -> ClassList:
    """A shipped list ("imagenet1k", "imagenet100", "miniature", ...) or a UTF-8 text file, one class per line.

    A line is "id<TAB>name", or just "name", whose id is then made from it. Blank lines do not count. ImageNet's usual
    files are read as well: lines "wnid name", and JSON as in `parse_json_classes`. UserError for an unknown name, and
    for a file that is empty, is not UTF-8, repeats a line or an id, holds control characters, has path characters in
    an id, or is in another format (CSV, YAML, quoted names, comments).
    """
    text = str(name_or_path)
    if text in shipped_lists():
        return parse_classes((_DATA / f"{text}.txt").read_bytes(), text)
    path = Path(text).expanduser()
    if path.is_dir():
        raise UserError(f"class list {path} is a directory; expected a text file with one class per line")
    if not path.is_file():
        raise UserError(f"class list {text!r} is neither a file nor one of {', '.join(shipped_lists())}")
    return parse_classes(path.read_bytes(), str(path))


def parse_classes(data: bytes, source: str) -> ClassList:
    """The classes in a file's bytes; `source` names the file in error messages."""
    decoded = (
        (number, _decode(raw, f"{source}, line {number}").strip(" "))
        for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    )
    lines = [(number, line) for number, line in decoded if line]
    if not lines:
        raise UserError(f"{source} holds no classes; write one class per line")
    if lines[0][1][0] in "[{":
        return parse_json_classes("\n".join(line for _, line in lines), source)
    if all(_WNID_LINE.fullmatch(line) for _, line in lines):
        lines = [(number, _WNID_LINE.sub(r"\1\t\2", line)) for number, line in lines]
    _require_list(lines, source)
    return _collect(lines, source)


def _collect(lines: Iterable[tuple[int, str]], source: str) -> ClassList:
    ids: dict[str, int] = {}
    names: list[str] = []
    seen: dict[str, int] = {}
    for number, line in lines:
        where = f"{source}, line {number}"
        if line in seen:
            raise UserError(f"{where}: {line!r} is already on line {seen[line]}; each class once")
        seen[line] = number
        class_id, name = _parse_line(line, where)
        if class_id in ids:
            raise UserError(
                f"{where}: the id {class_id!r} is already used on line {ids[class_id]}; "
                'write "id<TAB>name" with distinct ids'
            )
        ids[class_id] = number
        names.append(name)
    return ClassList(tuple(ids), tuple(names))


def parse_json_classes(text: str, source: str) -> ClassList:
    """The classes in a JSON file of one of the usual forms, in label order.

    A list of names; {"0": ["n01440764", "tench"], ...} (ImageNet's class index, where "_" in a name stands for a
    space); {"0": "tench", ...} (label to name); {"tench": 0, ...} (name to label); {"n01440764": "tench", ...} (id to
    name, in the file's order). UserError for anything else.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} looks like JSON, but is not valid ({error}); {_FORM}") from None
    lines = _json_lines(content)
    if not lines:
        raise UserError(
            f"{source}: this JSON is not a class list; expected a list of names, or a table from labels to names, "
            f"or {_FORM}"
        )
    return _collect(enumerate(lines, start=1), source)


def _json_lines(content: Any) -> list[str]:
    """One "name" or "id<TAB>name" for each class; empty if the form is not known."""
    if isinstance(content, list):
        return [_clean(name) for name in content] if _all_text(content) else []
    if not isinstance(content, dict) or not content:
        return []
    keys, values = list(content), list(content.values())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        order = sorted(keys, key=content.__getitem__)
        return [_clean(name) for name in order] if sorted(values) == list(range(len(values))) else []
    if not all(key.isdecimal() for key in keys):
        return (
            [f"{_clean(key)}\t{_clean(name)}" for key, name in content.items()] if _all_text(values) else []
        )
    return _by_label(content)


def _by_label(content: Mapping[str, Any]) -> list[str]:
    labels = sorted(content, key=int)
    if [int(label) for label in labels] != list(range(len(labels))):
        return []
    values = [content[label] for label in labels]
    if _all_text(values):
        return [_clean(name) for name in values]
    if all(isinstance(value, list) and len(value) == 2 and _all_text(value) for value in values):
        return [f"{_clean(wnid)}\t{_clean(name).replace('_', ' ')}" for wnid, name in values]
    return []


def _all_text(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


def _clean(text: str) -> str:
    return _checked(" ".join(text.split()), repr(text))


def _require_list(lines: Sequence[tuple[int, str]], source: str) -> None:
    """UserError naming the line and the reason when the file is a table or a document in another format."""
    for number, line in lines:
        if reason := _other_format(line):
            raise UserError(f"{source}, line {number}: {line[:60]!r} {reason}; {_FORM}")
    first = lines[0][1]
    cells = [cell.strip().strip("\"'").lower() for cell in re.split(r"[,;\t]", first)]
    if len(cells) > 1 and all(cell.replace(" ", "_") in _HEADER_WORDS for cell in cells):
        raise UserError(f"{source}, line {lines[0][0]}: {first!r} is the header of a table; {_FORM}")
    texts = [line for _, line in lines]
    for separator, what in ((",", "comma-separated"), (";", "semicolon-separated")):
        rows = [line.partition(separator) for line in texts]
        if all(rest and re.fullmatch(r"\d+|n\d{8}", start.strip()) for start, _, rest in rows):
            raise UserError(f"{source} is a {what} table; {_FORM}")
    numbers = [re.match(r"(\d+)[ :.)]+\S", line) for line in texts]
    found = [int(match[1]) for match in numbers if match]
    if len(texts) > 1 and len(found) == len(texts) and found in (_count(0, found), _count(1, found)):
        raise UserError(
            f"{source}: its lines are numbered, and the numbers would be part of the names; {_FORM}"
        )


def _count(start: int, like: Sequence[int]) -> list[int]:
    return list(range(start, start + len(like)))


def _other_format(line: str) -> str:
    """Why a line is not a class but a piece of another format; empty if it may be one."""
    if line.startswith("#"):
        return "looks like a comment, which a class list cannot hold"
    if line.startswith("- ") or line in ("---", "..."):
        return "looks like YAML"
    if line.endswith(":") and "\t" not in line:
        return "looks like a key of YAML"
    quoted = len(line) > 1 and line[0] == line[-1] and line[0] in "\"'`"
    return "is in quotes, which would be part of the name" if quoted or line.endswith(('",', "',")) else ""


def _decode(raw: bytes, where: str) -> str:
    try:
        line = raw.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    return _checked(line, where)


def _checked(text: str, where: str) -> str:
    """`text` in Unicode's composed form; UserError for control characters other than tabs."""
    bad = [c for c in text if c != "\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp")]
    if bad:
        raise UserError(f"{where}: control character {bad[0]!r}; a class is plain text")
    return unicodedata.normalize("NFC", text)


def _parse_line(line: str, where: str) -> tuple[str, str]:
    class_id, tab, name = line.partition("\t")
    class_id, name = class_id.strip(), name.strip(" ")
    if "\t" in name:
        raise UserError(f'{where}: more than one tab; write "id<TAB>name" or just "name"')
    if not tab:
        if _has_path_characters(line):
            raise UserError(
                f"{where}: the class name {line!r} has path characters (/ \\ ..); "
                'write "id<TAB>name" with an id that can be a file name'
            )
        return safe_file_name(line.lower()), line
    if not class_id or not name:
        raise UserError(f'{where}: an empty id or name; write "id<TAB>name"')
    if class_id != safe_file_name(class_id):
        raise UserError(
            f"{where}: the id {class_id!r} cannot be a file name; use letters, digits, '-', '_', '.', "
            f"for example {safe_file_name(class_id)!r}"
        )
    return class_id, name


def _has_path_characters(text: str) -> bool:
    return "/" in text or "\\" in text or text.startswith((".", "~")) or ".." in text


def safe_file_name(text: str) -> str:
    """`text` as one path component: no separators, no "..", no control characters, 1 to 100 bytes of UTF-8.

    Letters and digits of every script stay, runs of anything else become one "-". Different texts may give the
    same name.
    """
    text = unicodedata.normalize("NFC", text)
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^\w.]+", "-", text)).strip("-.")
    name = name.encode("utf-8", "ignore")[:_MAX_FILE_NAME_BYTES].decode("utf-8", "ignore").strip("-.")
    return name or "_"
