"""One process for each variant: they compile side by side, and a crash or a hang of one costs the others nothing.

Only one of them works on the GPU while times are taken: the caller hands out the turns.
"""

import os
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.gpu_suite.checking import use_built, wait_for_build
from bench.gpu_suite.processes import context, die_with_parent
from bench.gpu_suite.suite import Settings, reason
from bench.gpu_suite.variants import Denoiser, Variant, inputs_of
from ubgen.benchmark import peak_memory
from ubgen.benchmark.timing import calls_in_a_turn, milliseconds

CHECKED = 2  # images whose noise is compared with the reference


class Failed(Exception):
    """What a worker said before it gave up, or that it did not answer in time."""


class Worker:
    """The parent's end."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        self.variant = variant
        self._pipe, theirs = context().Pipe()
        self._process = context().Process(target=_serve, args=(theirs, variant, settings), daemon=False)
        self._process.start()
        theirs.close()

    def send(self, command: str, *arguments: Any) -> None:
        try:
            self._pipe.send((command, *arguments))
        except OSError as error:
            raise Failed("its process has ended") from error

    def answer(self, seconds: float) -> Any:
        """The result of the command that was sent; `Failed` ends the worker."""
        try:
            if not self._pipe.poll(max(seconds, 0)):
                raise Failed(f"no answer within {seconds:.0f} s")
            fine, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from error
        except Failed:
            self.stop()
            raise
        if not fine:
            self.stop()
            raise Failed(result)
        return result

    def ask(self, seconds: float, command: str, *arguments: Any) -> Any:
        self.send(command, *arguments)
        return self.answer(seconds)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, variant: Variant, settings: Settings) -> None:
    die_with_parent()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # several compile at the same time
    server = _Server(variant, settings)
    while True:
        try:
            command, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = getattr(server, command)(*arguments)
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, reason(error)))
            return
        pipe.send((True, result))


class _Server:
    """The worker's end: its methods are the commands."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        self.variant, self.settings = variant, settings
        self.denoiser: Denoiser | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.calls = 1

    def prepare(self, batches: Sequence[int]) -> float:
        """Build, and meet every batch once, so that all is compiled. Returns the seconds that it took."""
        start, tuning = time.monotonic(), self.variant.tuning
        if tuning is not None and tuning.native_norm:
            wait_for_build(self.settings)
        self.denoiser = Denoiser(self.variant, self.settings)
        for batch in batches:
            self.bind(batch)
        return time.monotonic() - start

    def bind(self, batch: int) -> dict[str, Any]:
        """Inputs of `batch` images. Returns the noise of the first ones, and the memory that was needed at most."""
        assert self.denoiser is not None
        self.inputs = inputs_of(self.settings, batch)
        x = {name: self.inputs[name] for name in ("latents", "timestep")}
        with peak_memory(self.settings.device) as peak:  # a graph's memory is taken when it is captured
            self.denoiser.bind(**x, cond=self.inputs["cond"], uncond=self.inputs["uncond"])
            noise = self.denoiser(**x)
        self.calls = calls_in_a_turn(self._step, self.settings.device)
        return {"noise": noise[:CHECKED].cpu().numpy(), "peak": peak.peak}

    def turn(self) -> float:
        """Milliseconds of a denoising call."""
        self._step()  # the GPU may just have served another process
        return milliseconds(self._step, self.calls, self.settings.device)

    def loop(self) -> float:
        """Milliseconds of the whole sampling loop."""
        assert self.denoiser is not None
        use_built(self.settings)
        denoiser, latents = self.denoiser, self.inputs["latents"]
        return milliseconds(lambda: denoiser.sample(latents), 1, self.settings.device)

    def _step(self) -> None:
        assert self.denoiser is not None
        self.denoiser(self.inputs["latents"], self.inputs["timestep"])
