"""Reading a Q-Align checkpoint directory: one or several safetensors files, or the older pickled shards."""

import pickle
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.core.weights import read_header, read_json_object, require_finite, require_real_file

# a table that older library versions saved with the weights; we compute it
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json. UserError when it is missing or holds no JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a Q-Align directory, it has no config.json")
    return read_json_object(path)


def weight_files(directory: Path) -> list[Path]:
    """The shards in order of preference: safetensors (index, single file, several), then pickles likewise."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        single = directory / f"{stem}.{suffix}"
        if index.is_file():
            return _indexed(index)
        if single.is_file():
            return [single]
        found = sorted(directory.glob(f"{stem}-*.{suffix}")) or sorted(directory.glob(f"*.{suffix}"))
        if found:
            return found
    raise UserError(
        f"{directory}: no Q-Align weights (model.safetensors, an index with its shards, or *.bin)"
    )


def _indexed(index: Path) -> list[Path]:
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index}: no 'weight_map' in it")
    files = [index.parent / Path(str(name)).name for name in sorted(set(table.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{index}: it names {file.name}, which is missing")
    return files


def check_weight_files(directory: Path, expected: Mapping[str, torch.Size] | None = None) -> None:
    """UserError when a file of the checkpoint is not there as a whole; reads the headers alone.

    `expected`: the network's tensors and their shapes, where the headers are to be compared with them.
    """
    found = set()
    for file in weight_files(directory):
        if file.suffix != ".safetensors":
            require_real_file(file)
            expected = None  # a pickle has no header
            continue
        for name, tensor in read_header(file).items():
            found.add(name)
            if expected is not None and not IGNORED.search(name):
                _check(file, name, torch.Size(tensor.shape), expected)
    if expected is not None:
        _require_all(directory, expected, found)


def _require_all(directory: Path, expected: Iterable[str], found: Container[str]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{directory}: the weights lack the tensor {missing[0]!r}{more}")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs, mapped from disk one at a time where the format allows it."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    yield name, shard.get_tensor(name)
        else:
            yield from _unpickle(file).items()
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{file}: not a readable weight file ({str(error).splitlines()[0]})") from None


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written in the format before torch 1.6, which can't be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def load_into(model: nn.Module, directory: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a model on the meta device its weights from `directory`, converted one tensor at a time.

    Every tensor must be there with the model's shape, and no other: UserError names the first that is not.
    """
    check_weight_files(directory)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for name, tensor in _tensors(file):
            if IGNORED.search(name):
                continue
            _check(file, name, tensor.shape, expected)
            state[name] = tensor.to(device=device, dtype=dtype, copy=True)
            require_finite([(name, state[name])], file)
    _require_all(directory, expected, state)
    model.load_state_dict(state, assign=True)


def _check(file: Path, name: str, shape: torch.Size, expected: Mapping[str, torch.Size]) -> None:
    if name not in expected:
        raise UserError(
            f"{file}: unexpected tensor {name!r}, Q-Align with this config.json has none of that name"
        )
    if shape != expected[name]:
        shapes = f"{tuple(shape)}, config.json needs {tuple(expected[name])}"
        raise UserError(f"{file}: tensor {name!r} has the shape {shapes}")
