"""The most memory that a piece of work held at any moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Bytes, filled in when the block ends: `held` before it, `peak` the most during it."""

    held: int = 0
    peak: int = 0

    @property
    def extra(self) -> int:
        """What the work needed on top of what was there."""
        return max(0, self.peak - self.held)


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """On a GPU what torch's allocator gave out (other libraries' own allocations are not in it); on the CPU the
    process's resident memory.
    """
    result = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.held = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the high-water mark back
        result.held = resident("VmRSS")
    yield result
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        result.peak = torch.cuda.max_memory_allocated(device)
    else:
        result.peak = resident("VmHWM")


def resident(field: str = "VmHWM") -> int:
    """Bytes of this process's memory: "VmHWM" the most since its start or the last reset, "VmRSS" now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_by_device(device: str | torch.device = "cpu") -> dict[str, int]:
    """Bytes since the start: "process", resident; on a GPU also "gpu_by_torch", what torch's allocator gave out."""
    peak = {"process": resident("VmHWM")}
    if torch.device(device).type == "cuda":
        peak["gpu_by_torch"] = torch.cuda.max_memory_allocated(device)
    return peak
