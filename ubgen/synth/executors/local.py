"""Workers on this machine: in this process if there is one, else a process for each."""

import multiprocessing
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ubgen.core.errors import UserError
from ubgen.dataset import open_store
from ubgen.synth.accounts import Account
from ubgen.synth.executors.job import Events, Job, devices
from ubgen.synth.leases import Leases
from ubgen.synth.worker import Links, work

DEATHS = 3
"""Workers that may die one after the other, with no shard finished in between, before the run gives up."""


def run_local(job: Job, shards: Sequence[int], events: Events) -> Account:
    """Make `shards`. A worker process that dies is replaced and its shards are begun again."""
    places = devices(job.config)[: max(1, len(shards))]
    leases = Leases(shards)
    if len(places) == 1:
        return _here(job, places[0], leases, events)
    return _Workers(job, places, leases, events).run()


def _here(job: Job, device: str, leases: Leases, events: Events) -> Account:
    def finished(shard: int) -> None:
        leases.finish("", shard)
        events.finished(shard)

    links = Links(lambda: leases.take(""), finished, events.progress)
    threads = torch.get_num_threads()
    try:
        chain = job.chain(job.config, job.plan, device, job.config.worker_threads(1))
        return work(chain, job.plan, job.config, open_store(job.config.out), links)
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Worker:
    name: str
    device: str
    process: BaseProcess
    pipe: Connection


class _Workers:
    def __init__(self, job: Job, places: Sequence[str], leases: Leases, events: Events) -> None:
        self._job = job
        self._places = places
        self._leases = leases
        self._events = events
        self._spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._alive: dict[Connection, _Worker] = {}
        self._account = Account()
        self._started = self._deaths = 0

    def run(self) -> Account:
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
        return self._account

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
            with suppress(ConnectionError):  # it died since: the pipe says so after what else it told
                worker.pipe.send(shard)
        elif kind == "finished":
            self._deaths = 0
            self._leases.finish(worker.name, value)
            self._events.finished(value)
        elif kind == "progress":
            self._events.progress(*value)
        elif kind == "error":
            raise value
        else:
            self._account.add(value)
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
        self._events.say(f"{worker.name} died (status {status}); its {len(lost)} shards are begun again")
        if self._leases.waiting:
            self._start(worker.device)


def _worker(job: Job, device: str, threads: int, pipe: Connection) -> None:
    """In the new process."""
    one_at_a_time = threading.Lock()  # several stages tell, each in its thread

    def tell(kind: str, value: Any) -> None:
        with one_at_a_time:
            pipe.send((kind, value))

    def take() -> int | None:
        tell("take", None)
        return pipe.recv()

    links = Links(take, lambda shard: tell("finished", shard), lambda *news: tell("progress", news))
    try:
        chain = job.chain(job.config, job.plan, device, threads)
        tell("account", work(chain, job.plan, job.config, open_store(job.config.out), links))
    except KeyboardInterrupt:
        pass  # the parent got it too, and says so
    except Exception as error:
        tell("error", picklable(error))


def picklable(error: Exception) -> Exception:
    """Errors of libraries may not survive the way through a pipe; those that the user is to read do."""
    if isinstance(error, UserError | OSError):
        return error
    import traceback

    return RuntimeError("".join(traceback.format_exception(error)))
