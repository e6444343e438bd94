"""Where a figure was measured: device, driver, versions, threads, and the settings that change speed."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
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
