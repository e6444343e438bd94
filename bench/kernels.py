"""The sampler's fused update against the same work in eager PyTorch: `python bench/kernels.py`.

Both sides take turns in one process; every figure is the median of the turns. Writes results/kernels.json and .md.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ubgen.benchmark.machine import describe, machine_record
from ubgen.benchmark.timing import Timing, compare
from ubgen.core.console import markdown_table
from ubgen.diffusion.schedule import PLMS
from ubgen.ops import cuda_status, guided_step, native_status
from ubgen.ops.step import guided_step_reference

RESULTS = Path(__file__).parent / "results"
BATCHES = (2, 8, 32)
BYTES = 8 * 4  # read and written per element: x, two noises, three histories; x_next, e


def measure(batch: int, device: str) -> dict[str, Timing]:
    """One PNDM step of Stable Diffusion's latents, and a copy that reads and writes as many bytes."""
    x, uncond, cond, *history = (torch.randn(batch, 4, 64, 64, device=device) for _ in range(6))
    arguments = (x, uncond, cond, history, 1.12, -0.12, 2.0, PLMS[3])
    source, target = (torch.ones(x.numel() * BYTES // 2, dtype=torch.uint8, device=device) for _ in range(2))
    sides: dict[str, Callable[[], object]] = {
        "eager": partial(guided_step_reference, *arguments),
        "fused": partial(guided_step, *arguments),
        "copy": partial(target.copy_, source),
    }
    return compare(sides, device, seconds=3)


def row(batch: int, times: dict[str, Timing]) -> list[str]:
    eager, fused, copy = (times[side].median for side in ("eager", "fused", "copy"))
    cells = (f"{1000 * eager:.0f}", f"{1000 * fused:.0f}", f"{eager / fused:.1f}", f"{1000 * copy:.0f}")
    return [f"{batch}x4x64x64", *cells]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels", help="without its ending")
    options = parser.parse_args()
    available, reason = native_status() if options.device == "cpu" else cuda_status()
    if not available:
        raise SystemExit(f"bench/kernels.py: {reason}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = machine_record(options.device)
    found = {batch: measure(batch, options.device) for batch in BATCHES}
    columns = ["latents", "eager, us", "fused, us", "eager / fused", "copy, us"]
    page = (
        "# A PNDM step in one pass over memory\n\n"
        "`python bench/kernels.py`: guidance and update of float32 latents with three histories, in eager PyTorch and "
        "by `ubgen.ops.guided_step`, with its checks and new outputs; beside it a copy of as many bytes. Medians.\n\n"
        f"{describe(machine)}.\n\n"
        f"{markdown_table(columns, [row(batch, times) for batch, times in found.items()])}\n"
    )
    print(page)
    rows = {batch: {side: asdict(timing) for side, timing in times.items()} for batch, times in found.items()}
    content = {"machine": machine, "milliseconds": rows}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
