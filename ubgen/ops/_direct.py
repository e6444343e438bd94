"""The short way into a native operation."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transform: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def direct(*tensors: Tensor | None) -> bool:
    """Whether the kernel may be called at once, past PyTorch's dispatcher: 50 microseconds, several times a small step.

    Only where nothing would notice: no gradient, trace, export, transform, dispatch mode or tensor subclass. False
    also when a future PyTorch no longer tells.
    """
    if _modes is None or _transform is None or torch.compiler.is_compiling() or _is_tracing():
        return False
    if _modes() or _transform() is not None:
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        kind = type(tensor)
        if tensor is not None and kind is not Tensor and kind is not Parameter:
            return False
        if grad and tensor is not None and tensor.requires_grad:
            return False
    return True
