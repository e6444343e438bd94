"""ONNX Runtime: torch's memory in and out, and nothing but the provider that was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from ubgen.core.errors import UserError
from ubgen.runtime import Dim, Network, Signature, TensorSpec
from ubgen.runtime.backends import backend
from ubgen.runtime.onnxruntime import ELEMENT_TYPES, open_network, open_session

ROWS = Dim("batch", 1, 4, 64)


def write_graph(path: Path, operator: str, element: int, width: int, **attributes: Any) -> Path:
    """x (B,width) -> y (B,width)."""
    source, target = (helper.make_tensor_value_info(name, element, ["batch", width]) for name in "xy")
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    graph = helper.make_graph([node], "graph", [source], [target])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        path,
    )
    return path


def signature(dtype: torch.dtype = torch.float32, width: int = 3) -> Signature:
    return Signature((TensorSpec("x", dtype, (ROWS, width)),), (TensorSpec("y", dtype, (ROWS, width)),))


def load(path: Path, signed: Signature, device: str = "cpu", **options: Any) -> Network:
    return backend("onnxruntime").load("net", path, signed, device, 1, options)


@pytest.mark.parametrize("dtype", list(ELEMENT_TYPES))
def test_every_type_passes_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_graph(tmp_path / "a.onnx", "Identity", ELEMENT_TYPES[dtype], 3)
    x = (torch.arange(12).view(4, 3) % 2 if dtype == torch.bool else torch.arange(12).view(4, 3)).to(dtype)
    y = load(path, signature(dtype)).run({"x": x})["y"]
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_memory_stays_flat(tmp_path: Path, growth: Callable[..., int]) -> None:
    """The outputs of one call are 256 KiB: all of them together would be 500 MiB."""
    path = write_graph(tmp_path / "a.onnx", "Neg", ELEMENT_TYPES[torch.float32], 65536)
    network = load(path, signature(width=65536))
    assert growth(network, {"x": torch.zeros(1, 65536)}) < 8 * 2**20


def test_a_truncated_graph(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "a.onnx", "Neg", ELEMENT_TYPES[torch.float32], 3)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.onnx cannot be opened by ONNX Runtime: .+"):
        load(path, signature())


def test_a_provider_that_is_missing_is_no_silent_cpu(tmp_path: Path) -> None:
    """ONNX Runtime itself would only warn."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    path = write_graph(tmp_path / "a.onnx", "Neg", ELEMENT_TYPES[torch.float32], 3)
    with pytest.raises(UserError, match=r"no CUDAExecutionProvider; pip uninstall onnxruntime, then"):
        open_session(path, 1, "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", {"provider": "cuda"}, "compiled for ONNX Runtime's cuda, not for 'cpu'"),
        ("cuda", {}, "compiled for ONNX Runtime's cpu, not for 'cuda'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, device: str, options: dict[str, Any], message: str) -> None:
    path = write_graph(tmp_path / "a.onnx", "Neg", ELEMENT_TYPES[torch.float32], 3)
    with pytest.raises(UserError, match=message):
        open_network("net", path, signature(), device, 1, options)
