"""TensorRT 10.12 and later, and 11: ONNX graph -> plan, and new weights into a built plan."""

from collections.abc import Sequence
from pathlib import Path

import tensorrt as trt
import torch

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write, cache_directory
from ubgen.export.compilers.onnx import tensorrt_graph
from ubgen.export.exportable import Exportable, Say
from ubgen.export.spec import NetworkSpec
from ubgen.runtime import TensorSpec
from ubgen.runtime.backends import device_architecture
from ubgen.runtime.tensorrt import LOG, open_plan, why


def compile_network(
    network: Exportable,
    spec: NetworkSpec,
    file: Path,
    device: str,
    say: Say,
    base: Path | None = None,
) -> list[Path]:
    """Write the plan `file`, for this kind of GPU and this version of TensorRT.

    `base` is a plan of this very network and spec with other weights, built with the option refit: the weights are
    put into a copy of it, which takes seconds; where that does not work, it is said and the plan is built anew.
    """
    if spec.precision == "float8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError('precision = "float8" needs a GPU of compute capability 8.9 or more')
    with tensorrt_graph(network, spec, file.with_suffix("")) as graph, torch.cuda.device(device):
        if base is not None:
            try:
                refit(base, graph, file)
                return [file]
            except UserError as error:
                say(f"{error}; building it anew")
        build(graph, network.input_specs(spec.batch), spec, device, say, file)
    return [file]


def build(
    onnx_file: Path, inputs: Sequence[TensorSpec], spec: NetworkSpec, device: str, say: Say, plan: Path
) -> None:
    """Build the plan of an ONNX file, typed as the file is, and write it to `plan`."""
    try:
        builder = trt.Builder(LOG)
    except TypeError as error:  # the library's null pointer
        raise UserError(f"TensorRT cannot build on this machine{why()}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    if not parser.parse_from_file(str(onnx_file)):
        reasons = [_text(parser.get_error(i)) for i in range(parser.num_errors)]
        raise UserError(f"{onnx_file.name}: TensorRT cannot read it: {reasons[0] if reasons else why()}")
    config = builder.create_builder_config()
    _set_options(config, spec)
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        profile.set_shape(tensor.name, tensor.at("min"), tensor.at("best"), tensor.at("max"))
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{onnx_file.name}: TensorRT does not take these shapes{why()}")
    timings = cache_directory("tensorrt") / f"timings-{trt.__version__}-{device_architecture(device)}"
    _use_timings(config, timings)
    progress = Progress(onnx_file.stem, say)
    config.progress_monitor = progress
    serialized = builder.build_serialized_network(network, config)
    if progress.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise UserError(f"{onnx_file.name}: TensorRT could not build it{why()}")
    atomic_write(plan, memoryview(serialized))
    if (timed := config.get_timing_cache()) is not None:
        atomic_write(timings, memoryview(timed.serialize()))


def refit(base: Path, onnx_file: Path, plan: Path) -> None:
    """Write to `plan` the plan `base` with the weights of an ONNX file of the same graph.

    UserError when `base` was not built for it, or holds weights that the file does not name.
    """
    engine = open_plan(base)
    refitter = trt.Refitter(engine, LOG)
    parser = trt.OnnxParserRefitter(refitter, LOG)
    if not parser.refit_from_file(str(onnx_file)) or not refitter.refit_cuda_engine():
        reasons = [_text(parser.get_error(i)) for i in range(parser.num_errors)]
        reasons += [f"no value for {name}" for name in refitter.get_missing_weights()]
        raise UserError(f"{base}: TensorRT cannot refit it: {reasons[0] if reasons else why()}")
    config = engine.create_serialization_config()
    # from 10.14 on a plan could be refitted this once only without the flag; before, it always stays refittable
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    atomic_write(plan, memoryview(engine.serialize_with_config(config)))


def _text(error: trt.ParserError) -> str:
    return error.desc()


def _set_options(config: trt.IBuilderConfig, spec: NetworkSpec) -> None:
    options = spec.options
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 is so because it must be exact
    if options.workspace_gb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 2**30))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.cuda_graphs:
        config.max_aux_streams = 0  # all on the captured stream


def _use_timings(config: trt.IBuilderConfig, file: Path) -> None:
    """Start from the kernel timings of earlier builds where they are of this device and version."""
    known = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


class Progress(trt.IProgressMonitor):
    """Says which phase a build is in, and ends it when the user interrupts: TensorRT would swallow the exception."""

    def __init__(self, name: str, say: Say) -> None:
        trt.IProgressMonitor.__init__(self)
        self.interrupted = False
        self._name = name
        self._say = say

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT when a phase begins."""
        try:
            if not parent_phase:
                self._say(f"{self._name}: {phase_name}")
        except KeyboardInterrupt:
            self.interrupted = True

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT after a step; False ends the build."""
        try:
            return not self.interrupted
        except KeyboardInterrupt:
            self.interrupted = True
            return False

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT when a phase ends."""
