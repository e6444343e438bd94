"""What an export would build, from the weights' config files alone, and whether this machine can."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ubgen.core import probes
from ubgen.export.compilers.onnx import EMBED_LIMIT
from ubgen.export.cost import count_flops, peak_activations
from ubgen.export.directory import EngineDirectory
from ubgen.export.exportable import Exportable
from ubgen.export.keys import FAMILY, engine_parts, find_inputs, network_keys, require_own_directory
from ubgen.export.mixed_precision import lower
from ubgen.export.networks import meta_networks
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.runtime import Signature
from ubgen.runtime.backends import backend
from ubgen.runtime.engine import json_hash


@dataclass(frozen=True)
class NetworkPlan:
    """`weight_bytes` in the engine's precision, `float32_bytes` before; `activation_bytes` at the largest batch."""

    name: str
    spec: NetworkSpec
    parameters: int
    float32_bytes: int
    weight_bytes: int
    activation_bytes: int
    signature: Signature
    network: Exportable

    @property
    def files(self) -> list[str]:
        """Names of the files that the runtime will open; weights beside the graph lie in a file of their own."""
        name = f"{self.name}{backend(self.spec.compiler).suffix}"
        apart = self.spec.compiler == "onnxruntime" and self.weight_bytes > EMBED_LIMIT
        return [name, f"{name}.data"] if apart else [name]

    def flops(self) -> int:
        """Of one image, or one text."""
        shapes = self.network.rows(self.network.inputs[0], 0, 1)
        return count_flops(self.network.module, shapes)[""]


@dataclass(frozen=True)
class Planned:
    """`built` names the networks that the output directory holds already; `problem`: why this machine would refuse."""

    networks: list[NetworkPlan]
    built: list[str]
    complete: bool
    problem: str | None


def plan_export(spec: EngineSpec, out: str | Path | None = None, lora: str | Path | None = None) -> Planned:
    """What `export_engine` would do with the same arguments. Reads no weights, but to compare those that built `out`.

    UserError when an input is missing, or `out` cannot be its directory.
    """
    inputs = find_inputs(spec, lora)
    if out is not None:
        require_own_directory(Path(out), inputs)
    plans = plan_networks(spec, inputs)
    if problem := machine_problem(spec):
        return Planned(plans, [], False, problem)
    there = out is not None and any(Path(out).glob("*.json"))
    built, complete = _built(spec, EngineDirectory(Path(str(out))), inputs) if there else ([], False)
    return Planned(plans, built, complete, memory_problem(spec, plans))


def _built(
    spec: EngineSpec, directory: EngineDirectory, inputs: Mapping[str, Path]
) -> tuple[list[str], bool]:
    """The networks that the directory holds already, and whether it holds the whole engine."""
    names = [name for name, _ in spec.networks.items()]
    parts = engine_parts(spec, inputs, directory.hashes)
    if directory.finished(json_hash(parts)):
        return names, True
    keys = {name: network_keys(name, spec, parts, inputs, directory.hashes)[0] for name in names}
    return [name for name in names if directory.find(name, key=keys[name])], False


def plan_networks(spec: EngineSpec, inputs: Mapping[str, Path]) -> list[NetworkPlan]:
    """One entry for each network; no weight is read. UserError when the image size does not fit the networks."""
    networks = meta_networks(spec.image_size, inputs)
    return [_plan(name, networks[name], network) for name, network in spec.networks.items()]


def machine_problem(spec: EngineSpec) -> str | None:
    """The first reason why this machine can't build `spec`; None when it can, as far as its memory suffices."""
    if spec.device == "cuda" and not (cuda := probes.torch_cuda()).available:
        return f"{cuda.name}: {cuda.detail}"
    reasons = (
        backend(network.compiler).missing(spec.device, network.precision, network.opset)
        for _, network in spec.networks.items()
    )
    return next((reason for reason in reasons if reason), None)


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


def memory_problem(
    spec: EngineSpec, plans: list[NetworkPlan], host: int | None = None, device: int | None = None
) -> str | None:
    """Why the export does not fit into `host` bytes, or the engines into `device` bytes; by default this machine's."""
    host, device = host or host_memory(), device or device_memory(spec.device)
    weights, largest = sum(plan.weight_bytes for plan in plans), max(plans, key=lambda p: p.activation_bytes)
    scratch = _scratch(plans)
    if (needed := weights + scratch) > device:
        return (
            f"networks.{largest.name} at batch.max = {largest.spec.batch.max} takes {_gib(largest.activation_bytes)}, "
            f"all networks {_gib(scratch)} beside {_gib(weights)} of weights, {_gib(needed)} together; "
            f"{spec.device} has {_gib(device)}: lower batch.max"
        )
    for family in dict.fromkeys(FAMILY.values()):
        members = [plan for plan in plans if FAMILY[plan.name] == family]
        # PyTorch's float32 weights, and a lowered copy that the compiler writes out
        copy = max(2 * plan.weight_bytes for plan in members)
        if (needed := sum(plan.float32_bytes for plan in members) + copy) > host:
            return (
                f"exporting the networks of --{family.replace('_', '-')} takes about {_gib(needed)} of memory; "
                f"this machine has {_gib(host)}"
            )
    return None


def _scratch(plans: list[NetworkPlan]) -> int:
    """Bytes beside the weights. Engines keep theirs; AOTInductor returns them after a call, except with CUDA graphs."""
    kept, given_back = [0], [0]
    for plan in plans:
        returns = plan.spec.compiler == "aotinductor" and not plan.spec.options.cuda_graphs
        (given_back if returns else kept).append(plan.activation_bytes)
    return sum(kept) + max(given_back)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _plan(name: str, network: Exportable, spec: NetworkSpec) -> NetworkPlan:
    lowered = lower(network.module, spec.precision, spec.keep_float32, device="meta")
    full = {
        n: _rows(t, spec.batch.max) if n not in network.constant else t for n, t in network.inputs[0].items()
    }
    peak, output = peak_activations(lowered, full, partial(keeps_scores, spec))
    size = _size(lowered)
    return NetworkPlan(
        name,
        spec,
        parameters=sum(parameter.numel() for parameter in network.module.parameters()),
        float32_bytes=_size(network.module),
        weight_bytes=size // 2 if spec.precision == "float8" else size,  # the lowered copy is in float16
        activation_bytes=peak,
        signature=network.signature(spec.batch, output),
        network=network,
    )


def keeps_scores(spec: NetworkSpec, query: Tensor, masked: bool) -> bool:
    """Whether the compiler may have no fused kernel for an attention, so that all its scores are in memory at once.

    PyTorch's own kernels, which AOTInductor calls, never do. ONNX Runtime needs opset 23 and, as our graphs use it, an
    attention without a mask in a type that its kernel takes. TensorRT fuses half precision up to a width of 256; below
    opset 23 it is taken to find the attention among the products by itself.
    """
    if spec.compiler == "aotinductor":
        return False
    exact = query.dtype == torch.float32
    if spec.compiler == "onnxruntime":
        fits = exact or (spec.options.provider == "cuda" and query.dtype == torch.float16)
        return spec.opset < 23 or masked or not fits
    return exact or query.shape[-1] > 256


def _size(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_empty(rows, *tensor.shape[1:])
