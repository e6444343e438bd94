"""Workers on this machine: in this process if there is one, else a process for each."""

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ubgen.core.errors import UserError
from ubgen.dataset import open_store
from ubgen.synth.config import SynthConfig
from ubgen.synth.generator import OpenSource, open_engine
from ubgen.synth.plan import Plan
from ubgen.synth.speed import Speed
from ubgen.synth.worker import work

DEATHS = 3
"""Workers that may die one after the other, with no shard finished in between, before the run gives up."""

Decided = Callable[[int, dict[str, float]], None]
"""See `work`."""


@dataclass(frozen=True)
class Job:
    """Everything that a worker in another process or on another machine needs."""

    config: SynthConfig
    plan: Plan
    open_source: OpenSource = open_engine

    def run(self, device: str, threads: int, **links: Any) -> Speed:
        """`work` here, on `device`."""
        source = self.open_source(self.config, self.plan, device, threads)
        return work(source, self.plan, self.config, open_store(self.config.out), **links)


class Leases:
    """Which worker makes which shard. A lease ends when the shard is finished or its worker is gone.

    Shards are handed out in order, one at a time; those of a worker that died are handed out again, first.
    """

    def __init__(self, shards: Iterable[int]) -> None:
        self._free = deque(shards)
        self._held: dict[str, set[int]] = {}

    def take(self, worker: str) -> int | None:
        """A shard for `worker`, or None when there is none left to begin."""
        if not self._free:
            return None
        shard = self._free.popleft()
        self._held.setdefault(worker, set()).add(shard)
        return shard

    def finish(self, worker: str, shard: int) -> None:
        """`shard` is written. A worker that was given up and lives on may say so of one that another holds by now."""
        self._held.get(worker, set()).discard(shard)

    def release(self, worker: str) -> list[int]:
        """Take back what `worker` held: it died."""
        shards = sorted(self._held.pop(worker, set()))
        self._free.extendleft(reversed(shards))
        return shards

    @property
    def waiting(self) -> int:
        """Shards that nobody holds."""
        return len(self._free)


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


def run_local(job: Job, shards: Sequence[int], decided: Decided, say: Callable[[str], None]) -> Speed:
    """Make `shards`. A worker process that dies is replaced and its shards are begun again."""
    places = devices(job.config)[: max(1, len(shards))]
    if len(places) == 1:
        return _here(job, places[0], shards, decided)
    return _Workers(job, places, shards, decided, say).run()


def _here(job: Job, device: str, shards: Sequence[int], decided: Decided) -> Speed:
    threads, left = torch.get_num_threads(), iter(shards)
    try:
        return job.run(
            device,
            job.config.worker_threads(1),
            take=lambda: next(left, None),
            finished=lambda shard: None,
            decided=decided,
        )
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Worker:
    name: str
    device: str
    process: BaseProcess
    pipe: Connection


class _Workers:
    def __init__(
        self,
        job: Job,
        places: Sequence[str],
        shards: Sequence[int],
        decided: Decided,
        say: Callable[[str], None],
    ) -> None:
        self._job = job
        self._places = places
        self._leases = Leases(shards)
        self._decided, self._say = decided, say
        self._spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._alive: dict[Connection, _Worker] = {}
        self._speed = Speed()
        self._started = self._deaths = 0

    def run(self) -> Speed:
        try:
            for device in self._places:
                self._start(device)
            while self._alive:
                for pipe in wait(list(self._alive), timeout=1.0):
                    self._listen(self._alive[pipe])  # type: ignore[index]
        finally:
            for worker in self._alive.values():
                worker.process.terminate()
                worker.process.join()
        return self._speed

    def _start(self, device: str) -> None:
        self._started += 1
        ours, theirs = self._spawn.Pipe()
        threads = self._job.config.worker_threads(len(self._places))
        process = self._spawn.Process(target=_worker, args=(self._job, device, threads, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the worker does
        self._alive[ours] = _Worker(f"worker {self._started}", device, process, ours)

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            return self._died(worker)
        if kind == "take":
            shard = self._leases.take(worker.name)
            with suppress(
                ConnectionError
            ):  # it has died: what it sent before comes first, then the pipe ends
                worker.pipe.send(shard)
        elif kind == "finished":
            self._deaths = 0
            self._leases.finish(worker.name, value)
        elif kind == "decided":
            self._decided(*value)
        elif kind == "error":
            raise value
        else:
            self._speed.add(value)
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        del self._alive[worker.pipe]

    def _died(self, worker: _Worker) -> None:
        self._end(worker)
        lost = self._leases.release(worker.name)
        self._deaths += 1
        status = worker.process.exitcode
        if self._deaths >= DEATHS:
            raise UserError(
                f"{self._deaths} workers died one after the other (the last with status {status}) and no shard was "
                "finished in between; is there enough memory? Run the same command again to continue"
            )
        self._say(f"{worker.name} died (status {status}); its {len(lost)} shards are begun again")
        if self._leases.waiting:
            self._start(worker.device)


def _worker(job: Job, device: str, threads: int, pipe: Connection) -> None:
    """In the new process."""
    one_at_a_time = threading.Lock()  # several steps send, each in its thread

    def send(kind: str, value: Any) -> None:
        with one_at_a_time:
            pipe.send((kind, value))

    def take() -> int | None:
        send("take", None)
        return pipe.recv()

    try:
        speed = job.run(
            device,
            threads,
            take=take,
            finished=lambda shard: send("finished", shard),
            decided=lambda *news: send("decided", news),
        )
        send("speed", speed)
    except KeyboardInterrupt:
        pass  # the parent got it too, and says so
    except Exception as error:
        send("error", picklable(error))


def picklable(error: Exception) -> Exception:
    """Errors of libraries may not survive the way through a pipe; those that the user is to read do."""
    if isinstance(error, UserError | OSError):
        return error
    import traceback

    return RuntimeError("".join(traceback.format_exception(error)))
