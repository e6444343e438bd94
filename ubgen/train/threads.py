"""The same bits on one of the CPU's threads and on two.

PyTorch splits a few sums over its threads, so that another number of them rounds otherwise; and where two players play
against each other, such a difference grows into another run. These sums are done on one thread, which costs next to
nothing: they are small. On a GPU nothing changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is computed inside: the towers' encodings of texts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gradients_on_one_thread(network: nn.Module) -> None:
    """Let the weight gradient of every trainable convolution (a LoRA's) be computed on one thread, from now on."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad:
            layer.register_forward_hook(_on_one_thread)


def _on_one_thread(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    node = output.grad_fn
    if node is None or output.is_cuda:
        return
    threads = torch.get_num_threads()
    node.register_prehook(lambda *_: torch.set_num_threads(1))
    node.register_hook(lambda *_: torch.set_num_threads(threads))
