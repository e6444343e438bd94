"""Torch-TensorRT: the whole PyTorch program as one TensorRT plan, run without Torch-TensorRT."""

from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
import torch_tensorrt
from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter, impl

from ubgen.core.files import atomic_write, cache_directory
from ubgen.export.compilers import one_line
from ubgen.export.exportable import Exportable, Say
from ubgen.export.spec import NetworkSpec
from ubgen.runtime import Dim, TensorSpec


def compile_network(network: Exportable, spec: NetworkSpec, file: Path, device: str, say: Say) -> list[Path]:
    """Write the plan `file`, its tensors named as the network's are."""
    inputs = network.input_specs(spec.batch)
    names = {tensor.name: tensor.name for tensor in inputs}
    with one_line(file.stem, "Torch-TensorRT"):
        serialized = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            network.program(spec.batch),
            arg_inputs=(),
            kwarg_inputs={tensor.name: torch_tensorrt.Input(**_input(tensor)) for tensor in inputs},
            kwarg_input_binding_names=names,
            output_binding_names=network.output,
            **_settings(spec, device),
        )
    atomic_write(file, serialized)
    return [file]


def _settings(spec: NetworkSpec, device: str) -> dict[str, Any]:
    options = spec.options
    return {
        "device": device,
        "disable_tf32": True,  # what is float32 is so because it must be exact
        "workspace_size": int((options.workspace_gb or 0) * 2**30),
        "optimization_level": options.optimization_level,
        "max_aux_streams": 0 if options.cuda_graphs else None,
        "require_full_compilation": True,
        "offload_module_to_cpu": True,  # the GPU's memory is the builder's
        "attn_bias_is_causal": False,  # its default takes every mask for a causal one
        "timing_cache_path": str(cache_directory("torch-tensorrt") / "timings.bin"),
    }


def _input(tensor: TensorSpec) -> dict[str, Any]:
    """Arguments of `torch_tensorrt.Input`."""
    if not any(isinstance(size, Dim) for size in tensor.shape):
        return {"shape": tensor.shape, "dtype": tensor.dtype}
    shapes = {"min_shape": tensor.at("min"), "opt_shape": tensor.at("best"), "max_shape": tensor.at("max")}
    return {**shapes, "dtype": tensor.dtype}


def _reads_bytes(node: Any, settings: Any = None) -> bool:
    value = node.args[0].meta.get("val")
    return value is not None and value.dtype == torch.uint8


def _makes_bytes(node: Any, settings: Any = None) -> bool:
    return node.kwargs.get("dtype") == torch.uint8


@dynamo_tensorrt_converter(
    torch.ops.aten._to_copy.default, capability_validator=_makes_bytes, supports_dynamic_shapes=True
)
def cast_to_bytes(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> trt.ITensor:
    """8-bit pixels as an output: Torch-TensorRT's own converters of the cast leave that type out."""
    network: trt.INetworkDefinition = ctx.net
    return network.add_cast(args[0], trt.DataType.UINT8).get_output(0)


@dynamo_tensorrt_converter(
    torch.ops.aten.sym_size.int,
    capability_validator=_reads_bytes,
    priority=ConverterPriority.HIGH,
    supports_dynamic_shapes=True,
)
def size_of_bytes(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> trt.ITensor:
    """The size of an input of 8-bit pixels: no layer of TensorRT but a cast takes them, not even for their shape."""
    network: trt.INetworkDefinition = ctx.net
    numbers = network.add_cast(args[0], trt.DataType.FLOAT).get_output(0)
    return impl.shape.shape(ctx, target, None, name, numbers, args[1])
