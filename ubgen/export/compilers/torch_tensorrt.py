"""Torch-TensorRT: the whole PyTorch program as one TensorRT plan, run without Torch-TensorRT."""

from pathlib import Path
from typing import Any

import torch_tensorrt

from ubgen.export.compilers import Compiled, Say
from ubgen.export.compilers.program import export_program, one_line
from ubgen.export.networks import Exportable
from ubgen.export.spec import NetworkSpec
from ubgen.manifest import atomic_write
from ubgen.runtime import Dim, TensorSpec
from ubgen.runtime.cache import cache_directory


def compile_network(network: Exportable, spec: NetworkSpec, path: Path, device: str, say: Say) -> Compiled:
    """`path`.plan, its tensors named as the network's are."""
    signature = network.signature(spec.batch)
    names = {tensor.name: tensor.name for tensor in signature.inputs}
    with one_line(path.name, "Torch-TensorRT"):
        serialized = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            export_program(network, spec),
            arg_inputs=(),
            kwarg_inputs={tensor.name: torch_tensorrt.Input(**_input(tensor)) for tensor in signature.inputs},
            kwarg_input_binding_names=names,
            output_binding_names=network.output,
            **_settings(spec, device),
        )
    plan = path.with_name(f"{path.name}.plan")
    atomic_write(plan, serialized)
    return Compiled([plan])


def _settings(spec: NetworkSpec, device: str) -> dict[str, Any]:
    options = spec.options
    return {
        "device": device,
        "disable_tf32": True,  # what is float32 is so because it must be exact
        "workspace_size": int((options.workspace_gb or 0) * 2**30),
        "optimization_level": options.optimization_level,
        "max_aux_streams": 0 if options.cuda_graphs else None,
        "require_full_compilation": True,
        "attn_bias_is_causal": False,  # its default takes every mask for a causal one
        "timing_cache_path": str(cache_directory("torch-tensorrt") / "timings.bin"),
    }


def _input(tensor: TensorSpec) -> dict[str, Any]:
    """Arguments of `torch_tensorrt.Input`."""
    if not any(isinstance(size, Dim) for size in tensor.shape):
        return {"shape": tensor.shape, "dtype": tensor.dtype}
    bounds = {"min_shape": "min", "opt_shape": "best", "max_shape": "max"}
    shapes = {
        key: tuple(getattr(size, bound) if isinstance(size, Dim) else size for size in tensor.shape)
        for key, bound in bounds.items()
    }
    return {**shapes, "dtype": tensor.dtype}
