"""The native guided step against the same expression in eager PyTorch: `python bench/guided_step.py`.

Prints a Markdown table: median time of a call in microseconds, both sides taking turns in one run.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch

from ubgen.manifest import device_name
from ubgen.ops import guided_step, native_status, reference

SHAPES = [(8, 4, 8, 8), (2, 4, 64, 64), (16, 4, 64, 64), (64, 4, 64, 64), (256, 4, 64, 64)]
WEIGHTS = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
REPEATS = 51


def microseconds(call: Callable[[], object], count: int) -> float:
    """Mean time of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - start) / count


def compare(shape: tuple[int, ...]) -> tuple[float, float]:
    """Median microseconds (eager, native), the sides taking turns."""
    x, uncond, cond, *history = (torch.randn(shape) for _ in range(6))
    arguments = (x, uncond, cond, history, 1.1189641, -0.11945176, 2.0, WEIGHTS)
    count = max(1, 200_000 // x.numel())
    sides = [lambda: reference.guided_step(*arguments), lambda: guided_step(*arguments)]
    times = [[microseconds(side, count) for side in sides] for _ in range(REPEATS)]
    eager, native = (statistics.median(column) for column in zip(*times, strict=True))
    return eager, native


@torch.no_grad()
def main() -> None:
    """Print where and what was measured, then the table."""
    print(
        f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.platform()}"
    )
    print(f"native library: {native_status()[1]}\n")
    print("| latents | eager, us | native, us | eager / native |\n| --- | --- | --- | --- |")
    for shape in SHAPES:
        eager, native = compare(shape)
        print(
            f"| {'x'.join(map(str, shape))} | {eager:.0f} | {native:.0f} | {eager / native:.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
