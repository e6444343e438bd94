"""The tensors of a checkpoint, whoever wrote it, under the names of a network."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ubgen.core.errors import UserError, first_line
from ubgen.core.weights import read_header, require_finite, require_real_file

Weights = Literal["ema", "raw"]
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "backbone", "network", "net", "student")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "network.", "net.", "encoder.")
_AVERAGE_PREFIXES = ("ema.", "ema_model.", "model_ema.", "averaged_model.")
_COUNTERS = ("num_batches_tracked", "n_averaged")  # they do not change what a network computes


def read_tensors(path: Path, weights: Weights) -> dict[str, Tensor]:
    """All tensors of a file of weights by name, on the CPU; of a nested checkpoint the average's or the others'.

    UserError when the file is missing, damaged, holds NaN, or cannot be read without running code in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    require_real_file(path)
    if path.suffix == ".safetensors":
        read_header(path)
        tensors = load_file(path)
    else:
        tensors = _innermost(_unpickled(path), path, weights)
    require_finite(tensors.items(), path)
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # options, in checkpoints of timm and others
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of the zip, the pickle and the storage, of many kinds
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise UserError(
                f"{path} holds pickled objects besides tensors, which could run code; save its state_dict alone"
            ) from None
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({first_line(error)})") from None


def _innermost(content: Any, path: Path, weights: Weights) -> dict[str, Tensor]:
    """Down through the names under which checkpoints keep their weights."""
    order = _AVERAGES + _PLAIN if weights == "ema" else _PLAIN + _AVERAGES
    while isinstance(content, Mapping):
        inner = next((content[name] for name in order if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        names = (
            ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise UserError(f"{path}: no weights found in it (it holds {names}); expected a state dict")
    return tensors


def is_head(name: str, network: nn.Module) -> bool:
    """Whether a tensor belongs to the classifier; a distilled network has two."""
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return name.startswith(tuple(f"{head}." for head in heads))


def fitted(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    path: Path,
    weights: Weights,
    model: str,
    *,
    any_classifier: bool = False,
) -> dict[str, Tensor]:
    """The tensors under the network's names, prefixes taken off; UserError naming the first one that does not fit.

    `any_classifier`: that part may be missing, or be of another size or kind.
    """
    wanted = network.state_dict()
    known = {name for name in wanted if not is_head(name, network)}
    found, left = _renamed(tensors, wanted.keys(), weights)
    if not known & found.keys():
        raise UserError(
            f"{path}: none of its tensors belongs to {model} (they are named like {min(tensors)!r}, "
            f"the network's like {min(known)!r})"
        )
    unexpected = [
        n for n in left if not n.endswith(_COUNTERS) and not (any_classifier and _ends_in_head(n, network))
    ]
    needed = known if any_classifier else wanted.keys()
    missing = [name for name in needed if name not in found and not name.endswith(_COUNTERS)]
    for what, names in (("is missing", missing), (f"is not of {model}", unexpected)):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} does not fit {model}: tensor {min(names)!r} {what}{more}")
    for name in sorted(needed & found.keys()):
        if found[name].shape != wanted[name].shape:
            raise UserError(
                f"{path} does not fit {model}: tensor {name!r} is {_size(found[name])} where the network has "
                f"{_size(wanted[name])}; is it of another input size, patch size or number of classes?"
            )
    counters = {n: v for n, v in wanted.items() if n.endswith(_COUNTERS)}
    return counters | found


def _renamed(
    tensors: Mapping[str, Tensor], wanted: Iterable[str], weights: Weights
) -> tuple[dict[str, Tensor], list[str]]:
    """What fits by name, and the names of the rest. Of two tensors for one name, `weights` says which counts."""
    wanted, groups, left = set(wanted), dict[str, dict[str, Tensor]](), list[str]()
    for full, tensor in tensors.items():
        name = full
        while name not in wanted and (prefix := _prefix(name)):
            name = name.removeprefix(prefix)
        if name in wanted:
            groups.setdefault(full.removesuffix(name), {})[name] = tensor
        else:
            left.append(full)

    def rank(prefix: str) -> tuple[bool, int]:
        average = any(part in f".{prefix}" for part in (f".{p}" for p in _AVERAGE_PREFIXES))
        return average == (weights == "ema"), len(groups[prefix])

    found: dict[str, Tensor] = {}
    for prefix in sorted(groups, key=rank):
        found |= groups[prefix]  # the best comes last
    return found, left


def _prefix(name: str) -> str:
    return next((p for p in _PREFIXES + _AVERAGE_PREFIXES if name.startswith(p)), "")


def _ends_in_head(name: str, network: nn.Module) -> bool:
    while not is_head(name, network) and (prefix := _prefix(name)):
        name = name.removeprefix(prefix)
    return is_head(name, network)


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
