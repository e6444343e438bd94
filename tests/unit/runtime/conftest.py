"""What the tests of the single compilers share."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ubgen.runtime import Network

CALLS = 2_000


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


def _give_back() -> None:
    """Memory that earlier tests freed and the allocator kept would hide what a network keeps now."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture
def growth() -> Callable[[Network, dict[str, torch.Tensor]], int]:
    """growth(network, inputs): bytes that 2,000 calls leave behind, after 500 that fill every cache."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc/self/statm")

    def measure(network: Network, inputs: dict[str, torch.Tensor]) -> int:
        for _ in range(500):
            network.run(inputs)
        gc.collect()
        _give_back()
        before = _resident()
        for _ in range(CALLS):
            network.run(inputs)
        gc.collect()
        _give_back()
        return _resident() - before

    return measure
