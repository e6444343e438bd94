"""What every executor is given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ubgen import runtime
from ubgen.core.errors import UserError
from ubgen.core.stage import read_manifest
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import Generator
from ubgen.synth.plan import Plan
from ubgen.synth.worker import Chain

MakeChain = Callable[[SynthConfig, Plan, str, int], Chain]
"""(settings, plan, device, compute threads) -> the networks, opened in the process that is to run them."""

MOST_BATCHES = 4
"""Batches at a time on a CPU. Each needs the memory of its own activations."""


def open_engine(config: SynthConfig, plan: Plan, device: str, threads: int) -> Generator:
    """The networks of `config.engine`.

    With ONNX Runtime on the CPU several batches are made at the same time, each by few threads: cores that work on
    batches of their own do not wait for each other after every operator (bench/results/synth.md). AOTInductor's
    packages keep Python's lock while they run.
    """
    unet = read_manifest(config.engine, "export")["engine"]["networks"]["unet"]
    concurrency = min(threads, MOST_BATCHES) if device == "cpu" and unet["compiler"] == "onnxruntime" else 1
    torch.set_num_threads(max(1, threads // concurrency))  # for what torch does between the networks
    engines = runtime.load(config.engine, device=device, threads=threads // concurrency)
    return Generator(engines, plan.classes, config, plan.prompts, concurrency)


@dataclass(frozen=True)
class Job:
    """Everything that a worker in another process or on another machine needs."""

    config: SynthConfig
    plan: Plan
    chain: MakeChain = open_engine


@dataclass(frozen=True)
class Events:
    """What the run wants to hear of: a shard on disk, images decided (with bottlenecks, see `Links`), a line for the
    user."""

    finished: Callable[[int], None]
    progress: Callable[[int, dict[str, float]], None]
    say: Callable[[str], None]


def devices(config: SynthConfig) -> list[str]:
    """One entry for each worker on this machine; UserError when a device is not there."""
    device = config.resolved_device()
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return [device] * (1 if config.workers == "auto" else config.workers)
    available = torch.cuda.device_count()
    if not available:
        raise UserError(f"--device {device}: this machine has no CUDA device; see ubgen-doctor")
    if int(number or 0) >= available:
        raise UserError(f"--device {device}: this machine has cuda:0 to cuda:{available - 1}")
    gpus = [device] if number else [f"cuda:{i}" for i in range(available)]
    if config.workers == "auto":
        return gpus
    return [gpus[i % len(gpus)] for i in range(config.workers)]
