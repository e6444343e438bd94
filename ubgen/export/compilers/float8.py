"""float8 by NVIDIA's Model Optimizer: quantise and dequantise nodes in a float16 ONNX graph, scaled on real inputs."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ubgen.core import probes
from ubgen.core.errors import UserError
from ubgen.export.exportable import Exportable

_ROWS = 32  # of real inputs, spread evenly; the largest values among them set the scales


def quantise(source: Path, network: Exportable, keep: Sequence[str], target: Path) -> Path:
    """Write the float8 graph of the float16 graph `source` (opset 22 at most) to `target`; returns `target`.

    Nodes of the modules named in `keep` stay as they are. Needs no GPU.
    """
    if not (probe := probes.modelopt()).available:
        raise UserError(f'precision = "float8" needs {probe.name}: {probe.detail}')
    from modelopt.onnx.quantization import quantize

    large = source.with_name(f"{source.name}.data").exists()
    quantize(
        str(source),
        quantize_mode="fp8",
        calibration_data=calibration_rows(network),
        calibration_method="max",
        calibration_eps=["cuda:0", "cpu"] if probes.onnxruntime_cuda().available else ["cpu"],
        nodes_to_exclude=[f"^{re.escape(name)}$" for name in _nodes_of(source, keep)],
        use_external_data_format=large,
        # "fp16" would turn the modules that were left in float32 into float16 as well
        high_precision_dtype="fp32",
        output_path=str(target),
        log_level="ERROR",
    )
    _match_scales(target, large)
    return target


def calibration_rows(network: Exportable) -> dict[str, np.ndarray]:
    """Rows of all real inputs along the first axis; the inputs that all rows share are repeated for each."""
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    for given in network.inputs:
        count = network.count(given)
        for name, tensor in given.items():
            rows[name].append(tensor.repeat_interleave(count, 0) if name in network.constant else tensor)
    every = {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items()}
    total = len(next(iter(every.values())))
    chosen = np.linspace(0, total - 1, min(_ROWS, total)).round().astype(int)
    return {name: array[chosen] for name, array in every.items()}


def _nodes_of(source: Path, modules: Sequence[str]) -> Iterator[str]:
    """Names of the nodes that the exporter made from these modules or what is inside them."""
    for node in onnx.load(source, load_external_data=False).graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = notes.get("pkg.torch.onnx.name_scopes", "")
        if any(f"'{module}'" in scopes for module in modules):
            yield node.name


def _match_scales(path: Path, large: bool) -> None:
    """Give every scale the type of the tensor that it scales: some are left in float32 in a float16 graph."""
    model = onnx.load(path)
    graph = model.graph
    scales = {tensor.name: tensor for tensor in graph.initializer}
    readers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    types = _types(path, model)
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            for user in (node, *readers[node.output[0]]):
                _retype(scales[user.input[1]], types[node.input[0]])
    onnx.save(
        model,
        path,
        save_as_external_data=large,
        location=f"{path.name}.data" if large else None,
    )


def _types(path: Path, model: onnx.ModelProto) -> Mapping[str, int]:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _retype(scale: onnx.TensorProto, element: int) -> None:
    if scale.data_type != element:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale).astype(dtype), scale.name))
