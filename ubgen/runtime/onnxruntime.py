"""ONNX Runtime on the CPU, and on a GPU with its CUDA provider, on torch's own memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from ubgen.core.errors import UserError, first_line
from ubgen.core.probes import GET_ONNXRUNTIME_GPU
from ubgen.runtime.cuda_graphs import GraphedCalls, Inputs, Sizes
from ubgen.runtime.network import Network, Signature

ELEMENT_TYPES = {  # ONNX's numbers: numpy has no bfloat16
    torch.float32: 1,
    torch.uint8: 2,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}


def open_network(
    name: str, path: Path, signature: Signature, device: str, threads: int, options: Mapping[str, Any]
) -> Network:
    """The graph at `path`, run by `options["provider"]` ("cpu" or "cuda"; default: cpu).

    UserError when the file is not a graph, or the provider cannot run it here.
    """
    provider = options.get("provider", "cpu")
    if (provider == "cpu") != (torch.device(device).type == "cpu"):
        raise UserError(f"{name}: this engine was compiled for ONNX Runtime's {provider}, not for {device!r}")
    if provider == "cpu":
        return OnnxRuntimeNetwork(name, path, signature, threads)
    return OnnxRuntimeGpuNetwork(name, path, signature, device, threads, options)


class OnnxRuntimeNetwork(Network):
    """On the CPU."""

    def __init__(self, name: str, path: Path, signature: Signature, threads: int) -> None:
        super().__init__(name, signature, "cpu")
        self._session = open_session(path, threads, "CPUExecutionProvider")

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        outputs = self.signature.empty_outputs(sizes, self.device)
        self._session.run_with_iobinding(_bind(self._session, inputs, outputs))
        return outputs


class OnnxRuntimeGpuNetwork(Network):
    """On one GPU, on a stream of its own that waits for torch's current one and is waited for. For one thread."""

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
        self._stream = torch.cuda.Stream(device)
        graphs = bool(options.get("cuda_graphs"))
        settings = _cuda_settings(self._stream, graphs)
        self._session = open_session(path, threads, "CUDAExecutionProvider", settings)
        self._graphed = GraphedCalls(self._eager, self._capture) if graphs else None
        self._captured = 0

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        return self._graphed(inputs, sizes) if self._graphed else self._eager(inputs, sizes)

    def _eager(self, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
        outputs = self.signature.empty_outputs(sizes, self.device)
        self._enqueue(_bind(self._session, inputs, outputs), graph=-1)
        return outputs

    def _capture(self, inputs: Inputs, sizes: Sizes) -> "_OrtGraph":
        self._captured += 1
        return _OrtGraph(self, inputs, sizes, self._captured)

    def _enqueue(self, binding: Any, graph: int) -> None:
        """`graph`: which captured graph is replayed, or captured on its first call; -1 runs without."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        # the stream orders the work; the host need not wait for it
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(binding, options)
        current.wait_stream(self._stream)


class _OrtGraph:
    """ONNX Runtime's own CUDA graph of one size of call: fixed tensors, one graph number."""

    def __init__(self, network: OnnxRuntimeGpuNetwork, inputs: Inputs, sizes: Sizes, number: int) -> None:
        self._network = network
        self._number = number
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._outputs = network.signature.empty_outputs(sizes, network.device)
        self._binding = _bind(network._session, self._inputs, self._outputs)

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._network._enqueue(self._binding, self._number)
        return {name: tensor.clone() for name, tensor in self._outputs.items()}


def _session_options(threads: int) -> ort.SessionOptions:
    """Of every session here: `threads` for one operator, operators one after another."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # torch works between two calls: threads that spin while they wait would take its cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    path: Path, threads: int, provider: str, settings: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """A session of the provider, or UserError: ONNX Runtime itself would run on the CPU with a mere warning."""
    if provider not in ort.get_available_providers():
        raise UserError(f"{path}: this onnxruntime has no {provider}; {GET_ONNXRUNTIME_GPU}")
    try:
        session = ort.InferenceSession(
            str(path), _session_options(threads), providers=[(provider, dict(settings or {}))]
        )
    except Exception as error:  # onnxruntime's own exception classes share no base
        raise UserError(f"{path} cannot be opened by ONNX Runtime: {first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise UserError(f"{path}: ONNX Runtime could not start {provider}; are its CUDA libraries installed?")
    return session


def _bind(session: ort.InferenceSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            where = tensor.device.type, tensor.device.index or 0
            bind(name, *where, ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    return binding


def _cuda_settings(stream: torch.cuda.Stream, graphs: bool) -> dict[str, str]:
    return {
        "device_id": str(stream.device.index),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": "0",  # it would miss the tolerance of float32 graphs; half precision does not use it
        "enable_cuda_graph": str(int(graphs)),
    }
