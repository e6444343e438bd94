"""What every executor is given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ubgen import runtime
from ubgen.errors import UserError
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import Generator
from ubgen.synth.plan import Plan
from ubgen.synth.worker import Chain

MakeChain = Callable[[SynthConfig, Plan, str, int], Chain]
"""(settings, plan, device, compute threads) -> the networks, opened in the process that is to run them."""


def open_engine(config: SynthConfig, plan: Plan, device: str, threads: int) -> Chain:
    """The networks of `config.engine`."""
    engines = runtime.load(config.engine, device=device, threads=threads)
    return Generator(engines, plan.classes, config, plan.prompts)


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
    kind, _, number = config.device.partition(":")
    if kind != "cuda":
        return [config.device] * (1 if config.workers == "auto" else config.workers)
    available = torch.cuda.device_count()
    if not available:
        raise UserError(f"--device {config.device}: this machine has no CUDA device; see ubgen-doctor")
    gpus = [config.device] if number else [f"cuda:{i}" for i in range(available)]
    if config.workers == "auto":
        return gpus
    return [gpus[i % len(gpus)] for i in range(config.workers)]
