"""Engine directories: every network that synthesis needs, each compiled, behind one mapping."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.runtime.backends import backend
from ubgen.runtime.key import check_engine
from ubgen.runtime.network import Network, Signature


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
            f"{path}: its manifest is not that of an engine ({error}); export it again"
        ) from error
    return EngineSet(path, manifest, device, threads or torch.get_num_threads())
