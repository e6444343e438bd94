"""PNDM's whole loop beside diffusers' pipeline: the part of `unet_cpu.py` that measures what ubgen-synth's users get.

Every side makes the same batches with the same threads. Eager PyTorch takes one batch after another; a compiled UNet
does so too, and then several at a time with fewer threads each, which are ubgen-synth's lanes.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ubgen.benchmark import Table
from ubgen.benchmark.machine import describe
from ubgen.diffusion import sample_guided, with_sampler
from ubgen.runtime import Network, run_rows
from ubgen.synth.executors.job import MOST_BATCHES

GUIDANCE = 2.0
Turns = Mapping[str, list[tuple[float, float]]]


class Loop:
    """The loop of one diffusers UNet on prompts and noise that are drawn at random, (images,C,h,w) a batch."""

    def __init__(self, model: Any, noise_schedule: Any, network: Network, images: int, steps: int) -> None:
        self._scheduler = with_sampler(noise_schedule, "pndm")
        self._steps = steps
        self._pipeline = _pipeline(model, self._scheduler)
        generator = torch.Generator().manual_seed(3)
        size = model.config.sample_size
        encoded: Any = network.signature.inputs[2].shape  # of fixed sizes, but for the batch
        _, length, width = encoded
        self._latents = torch.randn(images, model.config.in_channels, size, size, generator=generator)
        self._cond = torch.randn(images, length, width, generator=generator)
        self._uncond = torch.randn(1, length, width, generator=generator)

    def eager(self) -> Tensor:
        return self._pipeline(
            prompt_embeds=self._cond,
            negative_prompt_embeds=self._uncond.expand_as(self._cond),
            latents=self._latents,
            num_inference_steps=self._steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images

    def compiled(self, network: Network) -> Tensor:
        prompts = {"cond": self._cond, "uncond": self._uncond, "guidance": torch.tensor([GUIDANCE])}

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return run_rows(network, {"latents": x, "timestep": timestep, **prompts})["noise"]

        return sample_guided(predict, self._scheduler, self._latents, steps=self._steps)


def _pipeline(model: Any, scheduler: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        None, None, None, model, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def measure_loop(
    model: Any,
    noise_schedule: Any,
    open_network: Callable[[int], Network],
    *,
    images: int,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Medians of `rounds` turns, with torch's threads as they are; `open_network` opens it for a number of threads.

    Everything a round holds is made `lanes` times, so that all lanes have work and the sides do the same.
    """
    threads = torch.get_num_threads()
    lanes = min(threads, MOST_BATCHES)  # as `open_engine` chooses them
    alone, shared = open_network(threads), open_network(threads // lanes)
    loop = Loop(model, noise_schedule, alone, images, steps)

    def in_lanes() -> None:
        with _torch_threads(threads // lanes), ThreadPoolExecutor(lanes) as pool:
            list(pool.map(loop.compiled, [shared] * lanes))

    sides = {
        "eager diffusers": lambda: [loop.eager() for _ in range(lanes)],
        "engine, a batch at a time": lambda: [loop.compiled(alone) for _ in range(lanes)],
        f"engine, {lanes} lanes as in ubgen-synth": in_lanes,
    }
    reference = loop.eager()
    error = float((loop.compiled(alone) - reference).abs().max() / reference.abs().max())
    times = take_turns(sides, rounds)
    eager, *others = times
    compared = {name: ratios({"eager": times[eager], "side": times[name]}) for name in others}
    settings = {"images": images, "steps": steps, "threads": threads, "lanes": lanes, "rounds": rounds}
    return {**settings, "error": error, "sides": compared}


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loop_table(result: Mapping[str, Any]) -> Table:
    """Images a second, and how many times as fast as eager each side is."""
    made = result["images"] * result["lanes"]
    table = Table(
        f"PNDM loop: {result['images']} images a batch, {result['steps']} steps, {result['threads']} threads",
        ("side", "images/s", "CPU s an image", "times as fast", "by CPU time"),
        text_columns=1,
    )
    rows = list(result["sides"].items())
    eager = rows[0][1]
    table.rows.append(
        ("eager diffusers", *_cells(made, eager["wall"]["eager"], eager["cpu"]["eager"]), "", "")
    )
    for name, row in rows:
        cells = _cells(made, row["wall"]["side"], row["cpu"]["side"])
        table.rows.append((name, *cells, f"{row['faster']:.2f}", f"{row['faster_cpu']:.2f}"))
    table.note = (
        f"Largest difference of the latents: {result['error']:.1e} of their largest value. Medians of "
    )
    table.note += f"{result['rounds']} turns in one process. {describe(result['machine'])}."
    return table


def _cells(made: int, wall: float, cpu: float) -> tuple[str, str]:
    return f"{made / wall:.3g}", f"{cpu / made:.3g}"


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> Turns:
    """(wall, CPU) seconds of every call, after one that does not count; on a busy machine the CPU's are steadier."""
    for call in sides.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratios(times: Turns) -> dict[str, Any]:
    """Medians of both sides, and how many times faster "side" is than "eager"."""
    wall = {name: statistics.median(t[0] for t in ts) for name, ts in times.items()}
    cpu = {name: statistics.median(t[1] for t in ts) for name, ts in times.items()}
    return {
        "wall": wall,
        "cpu": cpu,
        "faster": wall["eager"] / wall["side"],
        "faster_cpu": cpu["eager"] / cpu["side"],
        "times": {name: [[round(x, 4) for x in t] for t in ts] for name, ts in times.items()},
    }
