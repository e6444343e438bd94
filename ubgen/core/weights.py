"""Files of weights, looked at before anything is built on them: that they are what their names say, and finite."""

import difflib
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ubgen.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_LFS = b"version https://git-lfs"
_LARGEST_HEADER = 100 * 2**20  # bytes, of the format


class TensorInfo(NamedTuple):
    """What a file's header says of one tensor: `dtype` in safetensors' letters ("F16")."""

    dtype: str
    shape: tuple[int, ...]


def require_real_file(path: Path) -> None:
    """UserError when the file is only the pointer that Git LFS leaves where it did not download, or is empty."""
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
        )
    if not start:
        raise UserError(f"{path} is empty")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; UserError naming the file when it is missing, a Git LFS pointer, or anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    require_real_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, from its header alone; UserError when it is damaged or cut off."""
    require_real_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path} is not a safetensors file, or is cut off")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {n: TensorInfo(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path} is not a safetensors file: its header cannot be read") from None
    if 8 + length + end != size:
        raise UserError(
            f"{path} has {size} bytes where its header says {8 + length + end}; download it again"
        )
    return tensors


def weight_files(directory: Path, what: str) -> list[Path]:
    """The files of a checkpoint as transformers writes it, in order of preference: safetensors (an index with its
    shards, a single file, several), then pickles likewise. UserError where there is none; `what` names the network.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        single = directory / f"{stem}.{suffix}"
        if index.is_file():
            return _indexed(index)
        if single.is_file():
            return [single]
        if found := sorted(directory.glob(f"{stem}-*.{suffix}")):
            return found
    raise UserError(
        f"{directory}: no {what} weights (model.safetensors, an index with its shards, or pytorch_model*.bin)"
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


def read_tensors(file: Path) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) of a safetensors file or a pickle, mapped from disk one at a time where the format allows it.

    A pickle is read with `weights_only`: it cannot run code. UserError when the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    yield name, shard.get_tensor(name)
        else:
            yield from _unpickle(file).items()
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{file}: not a readable weight file ({str(error).splitlines()[0]})") from None


def _unpickle(file: Path) -> "dict[str, Tensor]":
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written in the format before torch 1.6, which can't be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def conversion(pickled: Path, target: Path) -> str:
    """The command that makes a safetensors file of a pickle, for messages."""
    tensors = f"{{k: v.contiguous().clone() for k, v in torch.load('{pickled}', weights_only=True).items()}}"
    save = f"s.save_file({tensors}, '{target}', {{'format': 'pt'}})"
    return f'python -c "import torch, safetensors.torch as s; {save}"'


def require_finite(tensors: Iterable[tuple[str, "Tensor"]], source: Path | str) -> None:
    """UserError naming the first tensor of `source` that holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{source}: tensor {name!r} holds NaN or infinity ({count} of {tensor.numel()} values); "
                "these weights are damaged, or were saved in too low a precision"
            )


def require_timm_model(name: str, where: str) -> None:
    """UserError, with the nearest name, unless timm has such a network."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        raise UserError(f"{where}: timm has no {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
