"""ONNX Runtime runs the ONNX file itself: there is nothing to compile but the graph."""

from pathlib import Path

from ubgen.export.compilers import Compiled, Say
from ubgen.export.compilers.program import one_line
from ubgen.export.networks import Exportable
from ubgen.export.onnx import export_onnx
from ubgen.export.spec import NetworkSpec


def compile_network(network: Exportable, spec: NetworkSpec, path: Path, device: str, say: Say) -> Compiled:
    """`path`.onnx, and `path`.onnx.data when the weights are large."""
    with one_line(path.name, "the ONNX exporter"):
        return Compiled(export_onnx(network, spec, path.with_name(f"{path.name}.onnx")))
