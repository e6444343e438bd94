"""What this machine can do at most: bytes copied and matrix products in a second, measured on random data."""

from collections.abc import Callable

import torch

from bench.gpu_suite.suite import Suite
from ubgen.benchmark import compare, machine_record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(suite: Suite) -> None:
    """Rows "copy" (bytes read plus bytes written) and "matmul" in each dtype; fact "machine"."""
    suite.fact(machine=machine_record(suite.device))
    seconds = 0.2 if suite.small else 2.0
    copied = 2 * (2**22 if suite.small else 2**31)
    ms = compare({"copy": _copy(copied // 2, suite.device)}, suite.device, seconds=seconds)["copy"].median
    suite.add(name="copy", bytes=copied, ms=ms, gb_per_second=copied / ms / 1e6)
    side = 256 if suite.small else 8192
    for name in ("float32",) if suite.small else ("bfloat16", "float16"):
        ms = compare({name: _product(side, name, suite.device)}, suite.device, seconds=seconds)[name].median
        suite.add(name="matmul", dtype=name, side=side, ms=ms, tflops=2 * side**3 / ms / 1e9)


def _copy(size: int, device: str) -> Callable[[], object]:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(side: int, dtype: str, device: str) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return lambda: a @ b
