"""TensorRT 10.12 and later, and 11: plans run on torch's memory and streams."""

import warnings
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.runtime.cuda_graphs import GraphedCalls, Inputs, Replay, Sizes, TorchGraph
from ubgen.runtime.network import Network, Signature, TensorSpec

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class Log(trt.ILogger):
    """Keeps what TensorRT says in place of an exception; the first logger handed in serves the whole process."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: deque[str] = deque(maxlen=16)  # TensorRT also complains in calls that succeed
        self.warnings: deque[str] = deque(maxlen=16)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        text = " ".join(msg.split())
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(text)
        elif severity == trt.ILogger.Severity.WARNING:
            self.warnings.append(text)


LOG = Log()


def why() -> str:
    """What TensorRT said since the last call, as the end of a sentence: the first error is the cause."""
    errors = list(LOG.errors)
    LOG.errors.clear()
    return f": {errors[0]}" if errors else ""


class TensorRtNetwork(Network):
    """A plan on one GPU, on a stream of its own that waits for torch's current one and is waited for. For one thread.

    All contexts share one block of scratch memory: they never run at the same time.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        signature: Signature,
        device: str,
        threads: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(name, signature, device)
        if torch.device(device).type != "cuda":
            raise UserError(f"{name}: this engine was compiled for TensorRT on a GPU, not for {device!r}")
        with torch.cuda.device(device):
            self._engine: trt.ICudaEngine = open_plan(path)
            check_plan(path, self._engine, signature)
            size = int(self._engine.device_memory_size_v2)
            self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            self._stream = torch.cuda.Stream(device)
            self._context = self._new_context()
        self._graphed = GraphedCalls(self._eager, self._capture) if options.get("cuda_graphs") else None

    def _new_context(self) -> trt.IExecutionContext:
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise UserError(f"{self.name}: TensorRT could not make an execution context{why()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return context

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        with torch.cuda.device(self._stream.device):
            return self._graphed(inputs, sizes) if self._graphed else self._eager(inputs, sizes)

    def _eager(self, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
        aligned = {name: _aligned(tensor) for name, tensor in inputs.items()}
        outputs = self.signature.empty_outputs(sizes, self._stream.device)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        self._enqueue(self._context, aligned, outputs, self._stream)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: Inputs, sizes: Sizes) -> Replay:
        """Shapes and addresses of a captured context are fixed, so each capture has its own."""
        context = self._new_context()
        outputs = self.signature.empty_outputs(sizes, self._stream.device)

        def run(inputs: Inputs) -> dict[str, Tensor]:
            self._enqueue(context, inputs, outputs, torch.cuda.current_stream())
            return outputs

        return TorchGraph(run, inputs)

    def _enqueue(
        self, context: trt.IExecutionContext, inputs: Inputs, outputs: Inputs, stream: torch.cuda.Stream
    ) -> None:
        """TensorRT answers False instead of raising: every answer is looked at."""
        fine = all(context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in inputs.items())
        for tensors in (inputs, outputs):
            fine &= all(context.set_tensor_address(name, t.data_ptr()) for name, t in tensors.items())
        if not fine or not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{self.name}: TensorRT refused the call{why()}")


def open_plan(path: Path) -> trt.ICudaEngine:
    """The plan in the file `path`, for the current device; UserError when it is none that this TensorRT can run.

    What TensorRT warns of meanwhile is passed on: above all that the plan was built on another GPU model.
    """
    runtime = _runtime()
    LOG.warnings.clear()  # left by a build: many, and of no use
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(f"{path} cannot be opened by TensorRT {trt.__version__}{why()}")
    for text in list(LOG.warnings):
        warnings.warn(f"{path}: TensorRT warns: {text}", stacklevel=2)
    return engine


@cache
def _runtime() -> trt.Runtime:
    """One for the process: it must outlive its engines."""
    try:
        return trt.Runtime(LOG)
    except TypeError as error:  # the library's null pointer
        raise UserError(f"TensorRT does not start on this machine{why()}") from error


def check_plan(path: Path, engine: trt.ICudaEngine, signature: Signature) -> None:
    """UserError when names, types or shape ranges of the plan differ from `signature`."""
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    if names != wanted:
        raise UserError(f"{path}: its tensors are {sorted(names)}, not {sorted(wanted)}; export it again")
    for spec in (*signature.inputs, *signature.outputs):
        is_input = engine.get_tensor_mode(spec.name) == trt.TensorIOMode.INPUT
        fits = is_input == (spec in signature.inputs) and (not is_input or _covers(engine, spec))
        if not fits or _dtype(engine.get_tensor_dtype(spec.name)) != spec.dtype:
            raise UserError(f"{path}: its {spec.name} is not the {spec} of the manifest; export it again")


def _covers(engine: trt.ICudaEngine, spec: TensorSpec) -> bool:
    """Whether the plan's first profile takes all shapes of an input."""
    low, high = spec.at("min"), spec.at("max")
    shape = tuple(engine.get_tensor_shape(spec.name))
    if len(shape) != len(low):
        return False
    if -1 not in shape:
        return shape == low == high
    smallest, _, largest = (tuple(dims) for dims in engine.get_tensor_profile_shape(spec.name, 0))
    return all(a <= b for a, b in zip(smallest, low, strict=True)) and all(
        a >= b for a, b in zip(largest, high, strict=True)
    )


def _dtype(dtype: trt.DataType) -> torch.dtype | None:
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.BOOL: torch.bool,
    }.get(dtype)


def _aligned(tensor: Tensor) -> Tensor:
    """A slice may start anywhere; a fresh tensor starts where TensorRT can read it."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
