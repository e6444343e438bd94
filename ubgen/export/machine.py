"""Whether this machine can build an engine spec: its device, its compilers, its memory."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.core.probes import Probe
from ubgen.export.compilers.tensorrt_operators import OLDEST_FOR_OPSET_23
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.runtime.backends import backend


def why_not(spec: EngineSpec) -> str | None:
    """The first reason why this machine can't build `spec`; None when it can, as far as its memory suffices."""
    if spec.device == "cuda" and not (cuda := probes.torch_cuda()).available:
        return f"{cuda.name}: {cuda.detail}"
    answers = [_probe(network, spec.device) for _, network in spec.networks.items()]
    if any(network.precision == "float8" for _, network in spec.networks.items()):
        answers.append(probes.modelopt())
    return next((f"{answer.name}: {answer.detail}" for answer in answers if not answer.available), None)


def require_machine(spec: EngineSpec) -> None:
    """UserError with the reason of `why_not`."""
    if reason := why_not(spec):
        raise UserError(f"this machine can't build the spec: {reason}")


def _probe(network: NetworkSpec, device: str) -> Probe:
    if network.options.provider == "tensorrt":
        return probes.onnxruntime_tensorrt()
    probe = backend(network.compiler).probe(device)
    if network.compiler != "tensorrt" or network.opset < 23:
        return probe
    newer = probes.at_least(probe, "tensorrt", OLDEST_FOR_OPSET_23)
    return probe if newer is probe else replace(newer, detail=f"{newer.detail}, or set opset = 20")


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    for limit in limits:
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return total


def device_memory(device: str) -> int:
    """Bytes of memory of the device that engines run on."""
    return host_memory() if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
