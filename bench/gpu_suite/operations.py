"""The part "kernels": every native operation against its reference, and the memory that it moves in a second.

Bytes are the fewest that the operation must move: each input read once, each output written once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_suite.suite import Suite
from ubgen import ops
from ubgen.benchmark import compare
from ubgen.ops import reference
from ubgen.ops._native import function
from ubgen.rewards.preprocess import CLIP_MEAN, CLIP_STD

PLMS = [55 / 24, -59 / 24, 37 / 24, -9 / 24]


@dataclass(frozen=True)
class Case:
    """`ours` and `eager` compute the same from the same tensors. `tolerance`: of the norm of the difference over the
    norm; 0 demands equal bits."""

    name: str
    shape: str
    ours: Callable[[], Any]
    eager: Callable[[], Any]
    moved: int
    tolerance: float


@torch.no_grad()
def run(suite: Suite) -> None:
    """A row for each case whose result is right."""
    device = torch.device(suite.device)
    if function("guided_step", device.type) is None:
        suite.skip(
            "native operations", "no native library for this device; what is timed is their PyTorch reference"
        )
    share = suite.share(0.05)
    for case in _cases(suite):
        with suite.guard(f"{case.name} {case.shape}"):
            error = _error(case.ours(), case.eager())
            if not error <= case.tolerance:
                raise ValueError(f"its result is wrong: relative error {error:.1e}")
            timings = compare({"ours": case.ours, "eager": case.eager}, device, seconds=share, least=3)
            ours = timings["ours"].median
            suite.add(
                operation=case.name,
                shape=case.shape,
                error=error,
                ms=ours,
                eager_ms=timings["eager"].median,
                gb_per_second=case.moved / ours / 1e6,
            )


def _cases(suite: Suite) -> Iterator[Case]:
    """Sizes of a large batch, so that no cache holds them; small ones where the call itself is what costs."""
    large, small = (1, 1) if suite.small else (256, 8)
    for batch in (large, small):
        yield _step(suite, (batch * 16, 4, 64, 64))
    for layout in (torch.contiguous_format, torch.channels_last):
        yield _quantise(suite, (large, 3, 32, 48) if suite.small else (64, 3, 512, 512), layout)
    for size in (20, 28) if suite.small else (224, 448):
        yield _resize(suite, (large, 32, 32, 3) if suite.small else (64, 512, 512, 3), size)
    for shape in (
        ((1, 32, 8, 8),) if suite.small else ((64, 320, 64, 64), (64, 1280, 16, 16), (2, 320, 64, 64))
    ):
        for layout in (torch.contiguous_format, torch.channels_last):
            yield _norm(suite, shape, layout)


def _step(suite: Suite, shape: tuple[int, ...]) -> Case:
    x, uncond, cond, *history = (torch.randn(shape, device=suite.device) for _ in range(6))
    given = (x, uncond, cond, history, 1.1189641, -0.11945176, 2.0, PLMS)
    return Case(
        "guided step, PNDM",
        _shape(x),
        lambda: ops.guided_step(*given),
        lambda: reference.guided_step(*given),
        8 * x.nbytes,
        0.0,
    )


def _quantise(suite: Suite, shape: tuple[int, ...], layout: torch.memory_format) -> Case:
    dtype = torch.float32 if suite.small else torch.bfloat16
    images = (torch.randn(shape, device=suite.device) / 4 + 0.5).to(dtype).contiguous(memory_format=layout)
    return Case(
        "quantise",
        _shape(images),
        lambda: ops.quantise(images),
        lambda: reference.quantise(images),
        images.nbytes + images.numel(),
        0.0,
    )


def _resize(suite: Suite, shape: tuple[int, ...], size: int) -> Case:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=suite.device)
    return Case(
        f"resize to {size}, normalise",
        _shape(pixels),
        lambda: ops.resize_normalise(pixels, size, CLIP_MEAN, CLIP_STD),
        lambda: reference.resize_normalise(pixels, size, CLIP_MEAN, CLIP_STD),
        pixels.nbytes + 4 * 3 * size * size * shape[0],
        1e-5,
    )


def _norm(suite: Suite, shape: tuple[int, ...], layout: torch.memory_format) -> Case:
    """Against PyTorch's two operations, which round to the dtype in between."""
    dtype = torch.float32 if suite.small else torch.bfloat16
    x = torch.randn(shape, device=suite.device).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(shape[1], device=suite.device) for _ in range(2))
    low_weight, low_bias = weight.to(dtype), bias.to(dtype)

    def eager() -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, low_weight, low_bias))

    def ours() -> Tensor:
        return ops.group_norm_silu(x, 32, weight, bias)

    tolerance = 1e-5 if suite.small else 1e-2
    return Case("GroupNorm + SiLU", _shape(x), ours, eager, 2 * x.nbytes, tolerance)


def _error(ours: Any, wanted: Any) -> float:
    """The largest over all outputs."""
    pairs = zip(*((side,) if isinstance(side, Tensor) else side for side in (ours, wanted)), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)) for a, b in pairs)


def _shape(x: Tensor) -> str:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    kind = str(x.dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, x.shape))} {kind}{', channels last' if last else ''}"
