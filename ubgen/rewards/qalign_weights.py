"""Reading a Q-Align checkpoint directory: one or several safetensors files, or the older pickled shards."""

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.core.errors import UserError
from ubgen.core.weights import (
    read_header,
    read_json_object,
    read_tensors,
    require_finite,
    require_real_file,
    weight_files,
)

# a table that older library versions saved with the weights; we compute it
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json. UserError when it is missing or holds no JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a Q-Align directory, it has no config.json")
    return read_json_object(path)


def qalign_files(directory: Path) -> list[Path]:
    """What `QAlign.load` reads of a directory."""
    return [directory / "config.json", *weight_files(directory, "Q-Align")]


def check_weight_files(directory: Path, expected: Mapping[str, torch.Size] | None = None) -> None:
    """UserError when a file of the checkpoint is not there as a whole; reads the headers alone.

    `expected`: the network's tensors and their shapes, where the headers are to be compared with them.
    """
    found = set()
    for file in weight_files(directory, "Q-Align"):
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


def load_into(model: nn.Module, directory: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a model on the meta device its weights from `directory`, converted one tensor at a time.

    Every tensor must be there with the model's shape, and no other: UserError names the first that is not.
    """
    check_weight_files(directory)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file in weight_files(directory, "Q-Align"):
        for name, tensor in read_tensors(file):
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
