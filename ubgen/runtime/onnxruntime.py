"""ONNX Runtime on the CPU, reading and writing torch's own memory."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from ubgen.errors import UserError
from ubgen.runtime.network import Network, Signature

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
}


class OnnxRuntimeNetwork(Network):
    def __init__(self, name: str, path: Path, signature: Signature, device: str, threads: int) -> None:
        super().__init__(name, signature, device)
        if torch.device(device).type != "cpu":
            raise UserError(
                f"{name}: this engine was compiled for ONNX Runtime on the CPU, not for {device!r}"
            )
        try:
            self._session = ort.InferenceSession(
                str(path), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exception classes share no base
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be opened by ONNX Runtime: {reason}") from error

    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        outputs = {
            spec.name: torch.empty(self.signature.output_shape(spec, sizes), dtype=spec.dtype)
            for spec in self.signature.outputs
        }
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding)
        return outputs


def session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # torch works between two calls: threads that spin while they wait would take its cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
