"""Class lists: the shipped ones by name, or the user's own text file."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ubgen.core.errors import UserError

_DATA = Path(__file__).resolve().parents[1] / "data" / "classes"
_MAX_FILE_NAME_BYTES = 100


@dataclass(frozen=True)
class ClassList:
    """Classes in label order. Ids are distinct and safe in file names; names are the prompts and may repeat."""

    ids: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def shipped_lists() -> list[str]:
    """Names that `load_classes` knows without a file."""
    return sorted(path.stem for path in _DATA.glob("*.txt"))


def load_classes(name_or_path: str | Path) -> ClassList:
    """A shipped list ("imagenet1k", "imagenet100", "miniature", ...) or a UTF-8 text file, one class per line.

    A line is "id<TAB>name", or just "name", whose id is then made from it. Blank lines do not count. UserError for an
    unknown name, and for a file that is empty, is not UTF-8, repeats a line or an id, holds control characters, or
    has path characters in an id.
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
    ids: dict[str, int] = {}
    names: list[str] = []
    lines: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = _decode(raw, f"{source}, line {number}").strip(" ")
        if not line:
            continue
        if line in lines:
            raise UserError(
                f"{source}, line {number}: {line!r} is already on line {lines[line]}; each class once"
            )
        lines[line] = number
        class_id, name = _parse_line(line, f"{source}, line {number}")
        if class_id in ids:
            raise UserError(
                f"{source}, line {number}: the id {class_id!r} is already used on line {ids[class_id]}; "
                'write "id<TAB>name" with distinct ids'
            )
        ids[class_id] = number
        names.append(name)
    if not ids:
        raise UserError(f"{source} holds no classes; write one class per line")
    return ClassList(tuple(ids), tuple(names))


def _decode(raw: bytes, where: str) -> str:
    try:
        line = raw.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    bad = [c for c in line if c != "\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp")]
    if bad:
        raise UserError(f"{where}: control character {bad[0]!r}; a class is plain text")
    return unicodedata.normalize("NFC", line)


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
