"""What a call of a network costs in floating-point operations, counted without weights and without running it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
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
