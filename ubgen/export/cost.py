"""What a call of a network costs, found without weights and without running it: FLOPs, and memory for activations."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
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
def peak_activations(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    keeps_scores: Callable[[Tensor, bool], bool] = lambda query, masked: False,
) -> tuple[int, Tensor]:
    """Most bytes that `module(**inputs)` holds at one moment in eager PyTorch, inputs and output included; the output.

    All tensors lie on "meta". Attention counts as one operation, but where `keeps_scores` (of its queries
    (B,heads,S,width), and of whether it is masked or causal) says that its scores are whole in memory: then they are
    there before and after the softmax. A compiler that fuses needs less.
    """
    with _Attention(keeps_scores), _Tracker() as tracker:
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


class _Attention(TorchFunctionMode):
    """On "meta" attention would always be taken apart, and its scores counted in float32."""

    def __init__(self, keeps_scores: Callable[[Tensor, bool], bool]) -> None:
        super().__init__()
        self._keeps_scores = keeps_scores

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **named: Any
    ) -> Tensor:
        masked = attn_mask is not None or any(rest) or bool(named.get("is_causal"))
        if self._keeps_scores(query, masked):
            scores = query.new_empty(*query.shape[:-1], key.shape[-2])
            torch.empty_like(scores)
        return query.new_empty(*query.shape[:-1], value.shape[-1])
