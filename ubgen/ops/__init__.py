"""Fused operations: each a readable reference and, where it was built, a native twin with the same results."""

from ubgen.ops._native import native_status
from ubgen.ops.step import guided_step

__all__ = ["guided_step", "native_status"]
