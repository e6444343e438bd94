"""How tensors (B, C, *) lie in memory, in the numbers of kernels.h."""

import torch
from torch import Tensor

NCHW, NHWC = 0, 1


def layout_of(x: Tensor) -> int:
    """NHWC for what is only channels-last; NCHW for all else, which is contiguous or has to become so."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return NHWC if last else NCHW


def as_layout(x: Tensor, layout: int) -> Tensor:
    """`x` in that layout, copied where it is not."""
    return x.contiguous(memory_format=memory_format(layout))


def memory_format(layout: int) -> torch.memory_format:
    """PyTorch's name of the layout."""
    return torch.channels_last if layout == NHWC else torch.contiguous_format
