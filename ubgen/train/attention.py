"""Which kernel computes the UNet's attention."""

from typing import Any

import torch

from ubgen.core import probes
from ubgen.core.errors import UserError


def set_attention(unet: Any, wanted: str, device: torch.device, precision: str) -> str:
    """Install `wanted` ("auto", "xformers", "sdpa") in `unet`; returns a line for the log.

    UserError when xformers is demanded but cannot run here.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    reason = "not asked for" if wanted == "sdpa" else _why_no_xformers(device, precision)
    if wanted == "xformers" and reason:
        raise UserError(f"attention: xformers cannot be used: {reason}; use auto or sdpa")
    # set directly: enable_xformers_memory_efficient_attention() first tries a float32 call that newer GPUs lack
    unet.set_attn_processor(AttnProcessor2_0() if reason else XFormersAttnProcessor())
    return f"attention: PyTorch's SDPA (xformers: {reason})" if reason else "attention: xformers"


def _why_no_xformers(device: torch.device, precision: str) -> str:
    probe = probes.xformers()
    if not probe.available:
        return probe.detail
    if device.type != "cuda":
        return f"has no operator for {device.type} tensors"
    if precision == "no" and torch.cuda.get_device_capability(device) > (9, 0):
        return "has no float32 operator for GPUs above compute capability 9.0"
    return ""
