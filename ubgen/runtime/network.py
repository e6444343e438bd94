"""The contract of a compiled network: named tensors in, named tensors out, checked against a signature."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ubgen.core.errors import UserError


@dataclass(frozen=True)
class Dim:
    """A dimension that may vary between calls; equal names in one signature mean equal sizes in one call."""

    name: str
    min: int
    best: int
    max: int

    def __str__(self) -> str:
        return f"{self.name} {self.min}..{self.max}"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int | Dim, ...]

    def __str__(self) -> str:
        sizes = ", ".join(str(size) for size in self.shape)
        return f"{_dtype_name(self.dtype)} ({sizes})"

    def at(self, bound: Literal["min", "best", "max"]) -> tuple[int, ...]:
        """The shape with every varying dimension at that size."""
        return tuple(getattr(size, bound) if isinstance(size, Dim) else size for size in self.shape)

    def to_dict(self) -> dict[str, Any]:
        shape = [asdict(size) if isinstance(size, Dim) else size for size in self.shape]
        return {"name": self.name, "dtype": _dtype_name(self.dtype), "shape": shape}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TensorSpec":
        shape = tuple(Dim(**size) if isinstance(size, dict) else int(size) for size in values["shape"])
        return TensorSpec(values["name"], getattr(torch, values["dtype"]), shape)


@dataclass(frozen=True)
class Signature:
    """Names, dtypes and shape ranges of a network's inputs and outputs, in the order of the graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> Dim:
        """The range of the first dimension of the first input."""
        size = self.inputs[0].shape[0]
        return size if isinstance(size, Dim) else Dim("batch", size, size, size)

    def check(self, network: str, inputs: Mapping[str, Tensor], device: str = "cpu") -> dict[str, int]:
        """The size of every varying dimension; UserError naming the first input that does not fit."""
        _check_names(network, {spec.name for spec in self.inputs}, set(inputs))
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            _check_tensor(network, spec, inputs[spec.name], sizes, device)
        return sizes

    def empty_outputs(self, sizes: Mapping[str, int], device: str | torch.device) -> dict[str, Tensor]:
        """New tensors for the outputs of a call whose varying dimensions have these sizes."""

        def shape(spec: TensorSpec) -> list[int]:
            return [sizes[size.name] if isinstance(size, Dim) else size for size in spec.shape]

        return {spec.name: torch.empty(shape(spec), dtype=spec.dtype, device=device) for spec in self.outputs}

    def to_dict(self) -> dict[str, Any]:
        return {
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Signature":
        inputs, outputs = (
            tuple(TensorSpec.from_dict(spec) for spec in values[key]) for key in ("inputs", "outputs")
        )
        return Signature(inputs, outputs)


class Network(ABC):
    """A compiled network. Compilers differ only in `_run`."""

    def __init__(self, name: str, signature: Signature, device: str = "cpu") -> None:
        self.name = name
        self.signature = signature
        self.device = device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, as new tensors on the network's device. No gradient.

        UserError when an input is missing, unknown, of another dtype or device, or outside its shape range.
        """
        sizes = self.signature.check(self.name, inputs, self.device)
        given = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        if torch.device(self.device).type == "cpu":
            return self._run(given, sizes)
        with exact_float32():  # compiled code may call PyTorch's convolutions
            return self._run(given, sizes)

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        """Run on checked, contiguous inputs; `sizes` holds the varying dimensions of this call."""


_exact_lock = threading.Lock()
_exact_users = 0
_former_tf32 = True, False


@contextmanager
def exact_float32() -> Iterator[None]:
    """PyTorch's float32 convolutions and products on a GPU without TensorFloat-32, which keeps 10 bits of 23.

    Every engine computes float32 so, in the comparison with PyTorch and in use. Threads may be inside at the same time:
    the last to leave puts the process's settings back.
    """
    global _exact_users, _former_tf32
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with _exact_lock:
        if not _exact_users:
            _former_tf32 = cudnn.allow_tf32, matmul.allow_tf32
            cudnn.allow_tf32 = matmul.allow_tf32 = False
        _exact_users += 1
    try:
        yield
    finally:
        with _exact_lock:
            _exact_users -= 1
            if not _exact_users:
                cudnn.allow_tf32, matmul.allow_tf32 = _former_tf32


def run_rows(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`network.run` on any number of rows (at least 1), on the network's device.

    Rows are cut into calls of at most the network's largest batch; a call of fewer than its smallest is filled up
    with copies of the last row, which are dropped again. Inputs that all rows share go into every call whole.
    """
    parts = [
        {name: tensor[:rows] for name, tensor in network.run(chunk).items()}
        for chunk, rows in _chunks(network, inputs)
    ]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunks(network: Network, inputs: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
    batch = network.signature.batch
    by_row = {spec.name for spec in network.signature.inputs if isinstance(spec.shape[0], Dim)}
    placed = {name: tensor.to(network.device) for name, tensor in inputs.items()}
    total = len(next(tensor for name, tensor in placed.items() if name in by_row))
    for start in range(0, total, batch.max):
        rows = min(batch.max, total - start)
        yield (
            {n: _filled(t[start : start + rows], batch.min) if n in by_row else t for n, t in placed.items()},
            rows,
        )


def _filled(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].repeat_interleave(missing, dim=0)])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_names(network: str, wanted: set[str], given: set[str]) -> None:
    if missing := sorted(wanted - given):
        raise UserError(f"{network}: input {missing[0]!r} is missing; it takes {', '.join(sorted(wanted))}")
    if unknown := sorted(given - wanted):
        raise UserError(f"{network}: no input is named {unknown[0]!r}; it takes {', '.join(sorted(wanted))}")


def _check_tensor(network: str, spec: TensorSpec, tensor: Tensor, sizes: dict[str, int], device: str) -> None:
    found = f"{_dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
    if tensor.dtype != spec.dtype or not _shape_fits(spec, tuple(tensor.shape), sizes):
        raise UserError(f"{network}: input {spec.name!r} is {found}; expected {spec}{_bound(spec, sizes)}")
    if tensor.device.type != torch.device(device).type:
        raise UserError(f"{network}: input {spec.name!r} is on {tensor.device}; the engine runs on {device}")


def _shape_fits(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for wanted, size in zip(spec.shape, shape, strict=True):
        if isinstance(wanted, int):
            fits = size == wanted
        else:
            fits = wanted.min <= size <= wanted.max and sizes.setdefault(wanted.name, size) == size
        if not fits:
            return False
    return True


def _bound(spec: TensorSpec, sizes: dict[str, int]) -> str:
    """Says what an earlier input already fixed, which the range alone would not explain."""
    names = [size.name for size in spec.shape if isinstance(size, Dim) and size.name in sizes]
    return "".join(f", with {name} = {sizes[name]} as in the other inputs" for name in names)
