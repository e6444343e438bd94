"""Recipes: TOML files read into dataclasses, with every key and type checked; paths into the package."""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ubgen.core.errors import UserError

T = TypeVar("T")
_PACKAGE = Path(__file__).resolve().parents[1]
_PREFIX = "ubgen:"


def resolve_path(text: str | Path) -> Path:
    """A path as the user means it: "ubgen:miniature/weights/clip" lies inside the installed package.

    Existence is not checked.
    """
    text = str(text)
    if text.startswith(_PREFIX):
        return _PACKAGE / text.removeprefix(_PREFIX)
    return Path(text).expanduser()


def require_directory(path: str | Path, what: str, *files: str) -> Path:
    """`resolve_path`, and UserError unless it is a directory that holds each of `files`.

    `what` names it in the message, for example "CLIP weights".
    """
    directory = resolve_path(path)
    if not directory.is_dir():
        raise UserError(f"{what}: {directory} is not a directory")
    for name in files:
        if not (directory / name).exists():
            raise UserError(f"{what}: {directory} has no {name}")
    return directory


def shipped_engine_specs() -> dict[str, Path]:
    """The engine specs that come with ubgen, by name."""
    # specs are installed inside the package; a checkout has them at its root
    return _shipped(_PACKAGE / "engine_specs", _PACKAGE.parent / "engines")


def engine_spec_path(name_or_path: str | Path) -> Path:
    """The TOML of an engine spec: a file's path, or the name of a shipped one ("miniature", "sd15-fp16")."""
    return _find_toml(name_or_path, "engine spec", shipped_engine_specs())


def recipe_path(name_or_path: str | Path, stage: str = "train") -> Path:
    """The TOML of a recipe: a file's path, or the name of one that is shipped for `stage` ("miniature")."""
    directory = _PACKAGE / "recipes" / ("" if stage == "train" else stage)
    return _find_toml(name_or_path, "recipe", _shipped(directory))


def _shipped(*directories: Path) -> dict[str, Path]:
    return {file.stem: file for directory in directories for file in sorted(directory.glob("*.toml"))}


def _find_toml(name_or_path: str | Path, what: str, shipped: Mapping[str, Path]) -> Path:
    path = resolve_path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return path
    name = str(name_or_path)
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"{what} {name!r} is neither a .toml file nor one of {', '.join(sorted(shipped)) or '(none)'}"
    )


def load_recipe(name_or_path: str | Path, cls: type[T], stage: str = "train") -> T:
    """Read a recipe shipped for `stage`, or a TOML file, into the dataclass `cls`, tables into nested dataclasses.

    UserError names the file and the key when a key is unknown (and the nearest valid one), missing or of another type.
    """
    path = recipe_path(name_or_path, stage)
    return from_dict(read_toml(path), cls, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content; UserError with the line of a syntax error."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def from_dict(values: dict[str, Any], cls: type[T], source: str) -> T:
    """Build the dataclass `cls` from parsed TOML; `source` (a file name) starts every error message."""
    return _build(values, cls, source, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as a JSON-able dictionary: paths as text, tuples as lists, enums by value."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _build(values: dict[str, Any], cls: Any, source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise UserError(f"{source}: unknown key {prefix + key!r}{_suggest(key, list(fields))}")
    for name, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in values and not optional:
            raise UserError(f"{source}: missing key {prefix + name!r}")
    return cls(**{k: _convert(v, hints[k], source, prefix + k) for k, v in values.items()})


def _suggest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(sorted(valid))}"


def _convert(value: Any, hint: Any, source: str, key: str) -> Any:
    """`value` as TOML gave it -> the type that the field declares, or UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, args[0], source, key)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, source, key)
    if origin is typing.Literal:
        return _require(
            value, value in args and type(value) in map(type, args), f"one of {list(args)}", source, key
        )
    if dataclasses.is_dataclass(hint):
        return _build(
            _require(value, isinstance(value, dict), "a table", source, key), hint, source, f"{key}."
        )
    if origin in (list, tuple):
        return _convert_sequence(value, origin, args, source, key)
    if origin is dict:
        _require(value, isinstance(value, dict), "a table", source, key)
        return {k: _convert(v, args[1], source, f"{key}.{k}") for k, v in value.items()}
    return _convert_scalar(value, hint, source, key)


def _convert_union(value: Any, options: tuple[Any, ...], source: str, key: str) -> Any:
    errors = []
    for option in options:
        if option is types.NoneType:  # TOML has no null: None can only be the default
            continue
        try:
            return _convert(value, option, source, key)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(value: Any, kind: Any, args: tuple[Any, ...], source: str, key: str) -> Any:
    _require(value, isinstance(value, list), "a list", source, key)
    if kind is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        _require(value, len(value) == len(args), f"a list of {len(args)}", source, key)
        hints = args
    else:
        hints = (args[0],) * len(value)
    return kind(
        _convert(v, h, source, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, source: str, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.value for member in hint]
        return hint(_require(value, value in choices, f"one of {choices}", source, key))
    # `type is` and not isinstance: true is no integer here
    return _require(value, type(value) is hint, f"of type {getattr(hint, '__name__', hint)}", source, key)


def _require(value: Any, holds: bool, wanted: str, source: str, key: str) -> Any:
    if not holds:
        raise UserError(f"{source}: {key} must be {wanted}, not {value!r}")
    return value
