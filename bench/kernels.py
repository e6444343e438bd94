"""The fused operations against the same work in eager PyTorch: `python bench/kernels.py`.

Both sides take turns in one process; every figure is the median of the turns. Writes results/kernels.json and .md.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from ubgen.core.stage import device_name
from ubgen.ops import _native, group_norm_silu, guided_step, quantise, reference, resize_normalise

RESULTS = Path(__file__).parent / "results"
WEIGHTS = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GOALS = {"guided_step": 3.0, "quantise": 3.0, "resize_normalise": 2.0, "group_norm_silu": 1.3}
SHARE = 0.7
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`kernel` is the native function alone, on outputs that exist; `bytes` is what it must read and write.

    `keep` holds the tensors whose addresses `kernel` was given.
    """

    operation: str
    what: str
    eager: Call
    ours: Call
    bytes: int
    kernel: Call | None = None
    keep: object = None


@dataclass(frozen=True)
class Row:
    """Medians in microseconds; rates in GB/s, of bytes read plus bytes written."""

    operation: str
    what: str
    eager: float
    ours: float
    ratio: float
    kernel: float | None
    rate: float | None
    copy_rate: float | None
    share: float | None


def steps(device: str) -> Iterator[Case]:
    """PNDM with its three histories, then DDIM with guidance inside the network."""
    dtypes = [torch.float32] * 3 + [torch.bfloat16]
    for batch, dtype in zip((2, 8, 32, 32), dtypes, strict=True):
        x, u, c, h0, h1, h2, x_next, e = (
            torch.randn(batch, 4, 64, 64, device=device).to(dtype) for _ in range(8)
        )
        arguments = (x, u, c, [h0, h1, h2], 1.12, -0.12, 2.0, WEIGHTS)
        history = (ctypes.c_void_p * 3)(h0.data_ptr(), h1.data_ptr(), h2.data_ptr())
        raw = (
            *(_native.DTYPES[dtype], x.data_ptr(), u.data_ptr(), c.data_ptr(), history, 3, None),
            *(
                (ctypes.c_float * 4)(*WEIGHTS),
                1.12,
                -0.12,
                2.0,
                0.0,
                x_next.data_ptr(),
                e.data_ptr(),
                x.numel(),
            ),
        )
        yield Case(
            "guided_step",
            f"PNDM, {batch}x4x64x64 {name(dtype)}",
            partial(reference.guided_step, *arguments),
            partial(guided_step, *arguments),
            8 * x.nbytes,
            partial(native("guided_step", device), *raw),
            keep=(x, u, c, h0, h1, h2, x_next, e),
        )
    x, u = (torch.randn(8, 4, 64, 64, device=device) for _ in range(2))
    plain: tuple[Any, ...] = (x, u, None, [], 1.12, -0.12, 1.0, [1.0])
    yield Case(
        "guided_step",
        "DDIM, guided outside, 8x4x64x64 float32",
        partial(reference.guided_step, *plain),
        partial(guided_step, *plain),
        3 * x.nbytes,
    )


def pictures(device: str) -> Iterator[Case]:
    """The decoder's output; eager with the statistics, then only the bytes."""
    kinds = [
        (torch.float32, torch.contiguous_format, "float32"),
        (torch.float32, torch.channels_last, "float32 channels-last"),
        (torch.bfloat16, torch.contiguous_format, "bfloat16"),
    ]
    for dtype, memory_format, label in kinds:
        x = (0.5 + 0.3 * torch.randn(4, 3, 512, 512, device=device)).to(dtype)
        x = x.contiguous(memory_format=memory_format)
        outputs = quantise(x)
        layout = int(memory_format == torch.channels_last)
        raw = (_native.DTYPES[dtype], layout, x.data_ptr(), 4, 512, 512, *(t.data_ptr() for t in outputs))
        kernel = partial(native("quantise", device), *raw)
        for what, eager in (("with statistics", eager_statistics), ("bytes only in eager", eager_bytes)):
            yield Case(
                "quantise",
                f"4x3x512x512 {label}, {what}",
                partial(eager, x),
                partial(quantise, x),
                x.nbytes + x.numel(),
                kernel,
                keep=(x, outputs),
            )


def eager_bytes(x: Tensor) -> Tensor:
    """What a user would write."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def eager_statistics(x: Tensor) -> tuple[Tensor, ...]:
    """The same with the checks, for images whose values are all finite."""
    values = x.flatten(1)
    return eager_bytes(x), values.amin(1), values.amax(1), (~values.isfinite()).sum(1)


def resizes(device: str) -> Iterator[Case]:
    """Four images of Stable Diffusion's size, for CLIP and for Q-Align."""
    pixels = torch.randint(0, 256, (4, 512, 512, 3), dtype=torch.uint8, device=device)
    for size in (224, 448):
        yield Case(
            "resize_normalise",
            f"4x512x512x3 to {size}",
            partial(eager_resize, pixels, size),
            partial(resize_normalise, pixels, size, MEAN, STD),
            pixels.numel() + 4 * 3 * size * size * 4,
        )


def eager_resize(pixels: Tensor, size: int) -> Tensor:
    """Torchvision, as its documentation has it."""
    images = transforms.to_dtype(pixels.permute(0, 3, 1, 2), torch.float32, scale=True)
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.normalize(transforms.resize(images, [size, size], bicubic, antialias=True), MEAN, STD)


def norms(device: str) -> Iterator[Case]:
    """Three levels of the UNet, two rows of the batch."""
    for channels, side in ((320, 64), (640, 32), (1280, 16)):
        for dtype, memory_format, label in (
            (torch.float32, torch.contiguous_format, "float32"),
            (torch.float32, torch.channels_last, "float32 channels-last"),
            (torch.bfloat16, torch.contiguous_format, "bfloat16"),
        ):
            x = torch.randn(2, channels, side, side, device=device).to(dtype)
            x = x.contiguous(memory_format=memory_format)
            weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
            yield Case(
                "group_norm_silu",
                f"2x{channels}x{side}x{side} {label}",
                partial(eager_norm, x, weight, bias),
                partial(group_norm_silu, x, 32, weight, bias, 1e-5),
                2 * x.nbytes,
            )


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The two layers of a residual block."""
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))


def native(operation: str, device: str) -> Callable[..., None]:
    """The native function; without it there is nothing to compare."""
    found = _native.function(operation, device)
    if found is None:
        raise SystemExit(f"bench/kernels.py: no native library for {device}")
    return found


def name(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")


def microseconds(call: Call, count: int, device: str) -> float:
    """Mean time of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / count


def copier(size: int, device: str) -> Call:
    """A copy that reads and writes `size` bytes together."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def measure(case: Case, turns: int, device: str) -> Row:
    """Eager, ours, the kernel alone and a copy of as many bytes, taking turns."""
    sides = {"eager": case.eager, "ours": case.ours}
    if case.kernel is not None:
        sides |= {"kernel": case.kernel, "copy": copier(case.bytes, device)}
    counts = {side: max(1, int(2000 / microseconds(call, 3, device))) for side, call in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(turns):
        for side, call in sides.items():
            times[side].append(microseconds(call, counts[side], device))
    median = {side: statistics.median(values) for side, values in times.items()}
    rates = {side: case.bytes / median[side] / 1e3 for side in ("kernel", "copy") if side in median}
    share = rates["kernel"] / rates["copy"] if rates else None
    return Row(
        case.operation,
        case.what,
        median["eager"],
        median["ours"],
        median["eager"] / median["ours"],
        median.get("kernel"),
        rates.get("kernel"),
        rates.get("copy"),
        share,
    )


def facts(device: str, turns: int) -> dict[str, object]:
    """Where and how."""
    status = _native.native_status() if device == "cpu" else _native.cuda_status()
    library = _native.library("cpu")
    large = 1 << 28
    return {
        "device": device_name() if device == "cuda" else f"CPU, {cpu_model()}",
        "threads": torch.get_num_threads(),
        "instruction_set": library.ubgen_cpu().decode() if library else "",
        "library": status[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "turns": turns,
        "load_average": round(os.getloadavg()[0], 1),
        "large_copy_gb_s": large
        / statistics.median(microseconds(copier(large, device), 2, device) for _ in range(5))
        / 1e3,
    }


def cpu_model() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(rows: list[Row]) -> str:
    """Markdown, with the goals that are missed marked."""
    lines = [
        "| operation | what | eager, us | ours, us | eager / ours | kernel alone, us | GB/s | copy, GB/s | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        missed = " (goal missed)" if row.ratio < GOALS[row.operation] else ""
        rates = "| | | |"
        if row.kernel and row.rate and row.copy_rate and row.share:
            slow = " (goal missed)" if row.share < SHARE else ""
            rates = (
                f"{row.kernel:.0f} | {row.rate:.0f} | {row.copy_rate:.0f} | {100 * row.share:.0f} %{slow} |"
            )
        lines.append(
            f"| {row.operation} | {row.what} | {row.eager:.0f} | {row.ours:.0f} | {row.ratio:.1f}{missed} | {rates}"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels", help="without its ending")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = facts(options.device, options.turns)
    rows = []
    for cases in (steps, pictures, resizes, norms):
        for case in cases(options.device):
            rows.append(measure(case, options.turns, options.device))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"facts": where, "goals": GOALS, "rows": [asdict(row) for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(page(where, rows))


def page(where: dict[str, object], rows: list[Row]) -> str:
    """The table with its facts."""
    listed = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in where.items())
    goals = ", ".join(f"{operation} {goal:g}" for operation, goal in GOALS.items())
    return (
        "# Fused operations against eager PyTorch\n\n"
        "`python bench/kernels.py`: both sides take turns in one process; medians. `share` is the kernel's bandwidth "
        "over that of a copy of as many bytes, both on memory that exists already; `ours` is the public function, with "
        f"its checks and new outputs.\n\nGoals for eager / ours: {goals}; share at least {100 * SHARE:.0f} %.\n\n"
        f"{listed}\n\n{table(rows)}\n"
    )


if __name__ == "__main__":
    main()
