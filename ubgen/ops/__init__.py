"""Fused operations: each a readable reference and, where it was built, a native twin with the same results."""

from ubgen.ops.native import cuda_status, native_status
from ubgen.ops.step import guided_step

__all__ = ["cuda_status", "guided_step", "native_status"]
