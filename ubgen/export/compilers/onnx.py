"""PyTorch module -> ONNX file, which ONNX Runtime runs as it is and TensorRT builds from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ubgen.core.console import quiet
from ubgen.export.compilers import one_line
from ubgen.export.compilers.float8 import quantise
from ubgen.export.compilers.onnx_passes import compute_equal_rows_once, fit_cpu, fit_cuda
from ubgen.export.exportable import Exportable, Say
from ubgen.export.spec import NetworkSpec

SPLIT = "TRT_decomposable"
EMBED_LIMIT = 2**30  # bytes of weights; a protobuf file ends at 2 GiB, larger ones go to a file beside it


def compile_network(network: Exportable, spec: NetworkSpec, file: Path, device: str, say: Say) -> list[Path]:
    """For ONNX Runtime: write the graph `file`, and `file`.data when the weights are large."""
    with one_line(file.stem, "the ONNX exporter"):
        return export_onnx(network, spec, file)


def export_onnx(network: Exportable, spec: NetworkSpec, path: Path, *, rewrite: bool = True) -> list[Path]:
    """Write `path` (and `path`.data when the weights are large); the batch is free within the spec's range.

    Returns the files written, the graph first. It is standard ONNX, but for ONNX Runtime: there it is rewritten for
    the provider's kernels (see `onnx_passes`). What guidance would compute twice is computed once;
    opset 23, whose norms and attention are single operators, gives both the most to work on. `rewrite` False leaves
    the graph as PyTorch's exporter writes it.
    """
    example = network.example(spec.batch)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # of an engine that is being replaced
    size = sum(p.numel() * p.element_size() for p in network.module.parameters())
    # the exporter warns about its own internals and about names of axes that are shared on purpose
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            network.module,
            args=(),
            kwargs=example,
            input_names=list(example),
            output_names=[network.output],
            opset_version=spec.opset,
            dynamo=True,
            dynamic_shapes=network.dynamic_shapes(spec.batch),
            verbose=False,
        )
        assert program is not None  # it would be with the exporter before dynamo's
        if rewrite and spec.compiler == "onnxruntime":
            (fit_cpu if spec.options.provider == "cpu" else fit_cuda)(program.model)
        elif rewrite:
            compute_equal_rows_once(program.model.graph)
            RemoveUnusedNodesPass()(program.model)
        program.save(str(path), external_data=size > EMBED_LIMIT)
    return [path, data] if data.exists() else [path]


@contextmanager
def tensorrt_graph(network: Exportable, spec: NetworkSpec, path: Path) -> Iterator[Path]:
    """The network as an ONNX file for TensorRT's parser, in a directory that goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        with one_line(path.name, "the ONNX exporter"):
            graph = export_onnx(network, spec, Path(scratch, f"{path.name}.onnx"))[0]
        if spec.precision == "float8":
            with one_line(path.name, "the float8 quantiser"):
                graph = quantise(graph, network, spec.keep_float32, Path(scratch, f"{path.name}.float8.onnx"))
        model = onnx.load(graph, load_external_data=False)
        cast_images(model.graph)
        let_attention_be_split(model.graph)
        onnx.save(model, graph)
        yield graph


def cast_images(graph: onnx.GraphProto) -> None:
    """Let 8-bit inputs reach the graph as float32: TensorRT has no operator but Cast that reads them.

    An exported network casts its pixels first, but takes the batch's size from them as they are.
    """
    images = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
    if not images:
        return
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in images:
                node.input[i] = f"{name}_float32"
    for name in sorted(images):
        cast = helper.make_node(
            "Cast", [name], [f"{name}_float32"], f"{name}_to_float32", to=TensorProto.FLOAT
        )
        graph.node.insert(0, cast)
    del graph.value_info[:]  # of the types that were there before


def let_attention_be_split(graph: onnx.GraphProto) -> None:
    """Let TensorRT use several kernels for an attention that none of its fused ones can do.

    Without this the build fails there: at a head of width 512, as in the VAE decoder, or in float32. The attribute is
    TensorRT's own. Its parser knows it; onnx's checker and ONNX Runtime refuse it.
    """
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute(SPLIT, 1))
