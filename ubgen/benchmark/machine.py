"""Where a figure was measured: device, driver, versions, threads, settings that change speed; and peak memory."""

import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ubgen.core.stage import cpu_name, library_versions

_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "UBGEN_DISABLE_NATIVE",
)


def machine_record(device: str | torch.device = "cpu") -> dict[str, Any]:
    """For the JSON file beside the figures; plain values only."""
    record: dict[str, Any] = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "versions": library_versions() | {"torch": torch.__version__},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "settings": _settings(),
    }
    if torch.device(device).type == "cuda":
        record["gpu"] = _gpu(device)
    return record


def describe(record: dict[str, Any]) -> str:
    """One line for a table's heading."""
    gpu, versions = record.get("gpu"), record["versions"]
    device = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else record["cpu"]
    threads = f"{record['settings']['threads']} of {record['cores']} cores, load {record['load']}"
    return f"{device}; {threads}; torch {versions['torch']}; {record['measured']}"


def _settings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _gpu(device: str | torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _query("driver_version"),
        "clocks": _query("clocks.sm,clocks.max.sm,clocks.mem,power.limit"),
    }


def _query(fields: str) -> str:
    """What nvidia-smi says of the first GPU; "unknown" where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (answer.stdout.splitlines() or ["unknown"])[0].strip()


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


def cpu_seconds() -> float:
    """CPU time of this process's threads, and of its children that run."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
