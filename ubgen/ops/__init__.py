"""Fused operations: each a readable reference and, where it was built, a native twin with the same results."""

from ubgen.ops._native import native_status
from ubgen.ops.norm import group_norm_silu
from ubgen.ops.quantise import Quantised, quantise
from ubgen.ops.resize import resize_normalise
from ubgen.ops.step import guided_step

__all__ = ["Quantised", "group_norm_silu", "guided_step", "native_status", "quantise", "resize_normalise"]
