"""Engine directories: the compiled networks behind one mapping, and the key that tells whether they still fit."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ubgen.core.errors import UserError
from ubgen.core.stage import content_hash, first_difference, read_manifest
from ubgen.runtime.backends import backend, device_architecture
from ubgen.runtime.network import Network, Signature

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
        "compilers": {name: backend(name).version() for name in sorted(compilers)},
        "architecture": device_architecture(device),
    }


class EngineSet(Mapping[str, Network]):
    """Network name -> `Network`. A network is opened when it is first asked for, and kept."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], device: str, threads: int) -> None:
        self.path = path
        self.manifest = manifest
        self.device = device
        self.key: str = manifest["engine"]["key"]
        self._entries: Mapping[str, Any] = manifest["engine"]["networks"]
        self._threads = threads
        self._opening = threading.Lock()
        self._open: dict[str, Network] = {}

    def __getitem__(self, name: str) -> Network:
        with self._opening:
            if name not in self._open:
                entry = self._entries[name]
                load_network = backend(entry["compiler"]).load
                signature = Signature.from_dict(entry["signature"])
                self._open[name] = load_network(
                    name, self.path / entry["file"], signature, self.device, self._threads, entry["options"]
                )
            return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(engine_dir: str | Path, device: str = "cpu", threads: int | None = None) -> EngineSet:
    """The finished engine directory `engine_dir`, after checking that it is whole and fits this machine.

    `threads` is the number of compute threads for each call of a network (default: torch's). UserError when the
    directory is unfinished, a file is missing or changed, or the spec, compiler version or device architecture differ.
    """
    path = Path(engine_dir)
    manifest = read_manifest(path, "export")
    try:
        check_engine(path, manifest["engine"], manifest["config"]["spec"], device)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: its manifest does not describe an engine ({error}); export it again"
        ) from error
    return EngineSet(path, manifest, device, threads or torch.get_num_threads())


def check_engine(directory: Path, engine: Mapping[str, Any], spec: Mapping[str, Any], device: str) -> None:
    """UserError naming the part when the directory, the compilers or the device do not match its key."""
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
