"""How much memory a call of a network takes beside its weights, found without weights and without running it."""

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
