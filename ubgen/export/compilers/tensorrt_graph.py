"""The ONNX file that a TensorRT plan is built from, or refitted from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ubgen.export.compilers.float8 import quantise
from ubgen.export.compilers.program import one_line
from ubgen.export.compilers.tensorrt_operators import check_operators
from ubgen.export.networks import Exportable
from ubgen.export.onnx import export_onnx
from ubgen.export.spec import NetworkSpec


@contextmanager
def onnx_graph(network: Exportable, spec: NetworkSpec, path: Path, version: str) -> Iterator[Path]:
    """The network as an ONNX file, in a directory that goes when the block ends.

    UserError when the parser of TensorRT `version` would not take it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        with one_line(path.name, "the ONNX exporter"):
            graph = export_onnx(network, spec, Path(scratch, f"{path.name}.onnx"))[0]
        if spec.precision == "float8":
            with one_line(path.name, "the float8 quantiser"):
                graph = quantise(graph, network, spec.keep_float32, Path(scratch, f"{path.name}.float8.onnx"))
        cast_images(graph)
        check_operators(graph, version)
        yield graph


def cast_images(path: Path) -> None:
    """Let 8-bit inputs reach the graph as float32: TensorRT has no operator but Cast that reads them.

    An exported network casts its pixels first, but takes the batch's size from them as they are.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
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
    onnx.save(model, path)
