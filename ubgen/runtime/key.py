"""The content key of an engine directory, and the check that it still fits."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.stage import content_hash
from ubgen.runtime.backends import compiler_version, device_architecture

FORMAT = 2  # of the engine directory; raise it when an older one can no longer be read


def json_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def key_parts(
    weights: Mapping[str, str], lora: str | None, spec: Mapping[str, Any], compilers: set[str], device: str
) -> dict[str, Any]:
    """All that an engine depends on: hashes of weights, LoRA and spec, compiler versions, device architecture."""
    return {
        "format": FORMAT,
        "weights": dict(weights),
        "lora": lora,
        "spec": json_hash(spec),
        "compilers": {name: compiler_version(name) for name in sorted(compilers)},
        "architecture": device_architecture(device),
    }


def flatten(parts: Mapping[str, Any]) -> dict[str, Any]:
    """{"weights": {"clip": h}} -> {"weights clip": h}: one line for each part that can differ."""
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        nested = {f"{name} {key}": item for key, item in value.items()} if isinstance(value, dict) else None
        flat.update(nested if nested is not None else {name: value})
    return flat


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """ "spec is X there and Y here", or None when all parts agree."""
    before, now = flatten(there), flatten(here)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"{name} is {_short(before.get(name))} there and {_short(now.get(name))} here"
    return None


def check_engine(directory: Path, engine: Mapping[str, Any], spec: Mapping[str, Any], device: str) -> None:
    """UserError naming the part when the directory, the compilers or the device are not those of its key."""
    parts = engine["parts"]
    if json_hash(parts) != engine["key"]:
        raise UserError(
            f"{directory}: the engine key does not match the parts in its manifest; export it again"
        )
    here = key_parts(parts["weights"], parts["lora"], spec, set(parts["compilers"]), device)
    if difference := first_difference(parts, here):
        raise UserError(f"{directory}: {difference}; run ubgen-export again on this machine")
    for name, network in engine["networks"].items():
        _check_files(directory, name, network["files"])
    _check_files(directory, "tokenizers and scheduler", engine["extras"])


def _check_files(directory: Path, owner: str, files: Mapping[str, str]) -> None:
    for file, expected in files.items():
        path = directory / file
        if not path.exists():
            raise UserError(f"{path} is missing ({owner}); run ubgen-export again")
        if content_hash(path) != expected:
            raise UserError(
                f"{path} is not the file that was exported ({owner} differs); run ubgen-export again"
            )


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text[:19] + "…" if text.startswith("sha256:") else text
