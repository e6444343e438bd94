"""What a call of a network costs, found without weights and without running it: FLOPs, and memory for activations."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """FLOPs of `module(**inputs)` by the path of each module that was called; "" is the whole.

    Matrix products, convolutions and attention, two FLOPs for each multiply-add (attention whole, whatever its
    mask); elementwise work is left out. Weights and inputs may lie on any device, "meta" included: only their
    shapes are read. A container that is not called itself (`nn.ModuleList`) counts as its children's sum.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # on "meta" attention is two plain matrix products; the CPU's fused kernel would be counted as nothing
    weights = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    shapes = {name: tensor.detach().to("meta") for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, weights, kwargs=shapes)
    root = type(module).__name__
    by_module = {
        name.removeprefix(root).removeprefix("."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    return _with_containers(by_module | {"": counter.get_total_flops()})


def _with_containers(by_module: dict[str, int]) -> dict[str, int]:
    total = dict(by_module)
    for path, flops in by_module.items():
        while path and (path := path.rpartition(".")[0]) not in by_module:
            total[path] = total.get(path, 0) + flops
    return total


@torch.no_grad()
def peak_activations(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """Most bytes that `module(**inputs)` holds at one moment in eager PyTorch, inputs and output included; the output.

    All tensors lie on "meta". Attention counts as one operation, as every compiler here has it. A compiler that fuses
    needs less.
    """
    with _FusedAttention(), _Tracker() as tracker:
        for tensor in inputs.values():
            tracker.add(tensor)
        output = module(**inputs)
    return tracker.peak, output


class _Tracker(TorchDispatchMode):
    """Adds up the storages of all tensors that were made under it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self._owners: Counter[int] = Counter()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and (
                leaf.untyped_storage()._cdata not in known or leaf.untyped_storage()._cdata in self._owners
            ):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._owners[key]:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._owners[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self._now -= size


class _FusedAttention(TorchFunctionMode):
    """On "meta" attention would be taken apart, and its matrix of scores counted, which no kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs or {}).values())[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
