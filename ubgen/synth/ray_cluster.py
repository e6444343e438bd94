"""Workers on a Ray cluster: one for each GPU, coming and going as the cluster grows and shrinks."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.core.probes import require_ray
from ubgen.dataset import open_store
from ubgen.synth.config import SynthConfig
from ubgen.synth.local import DEATHS, Decided, Job, Leases, picklable
from ubgen.synth.speed import Speed

_POLL = 0.5
_LOOK_AROUND = 5.0  # seconds between two looks at what the cluster has
_PATIENCE = 60.0  # seconds in which the coordinator must answer
_START = 600.0  # seconds in which it must be there: a busy machine imports PyTorch from a network file system
_ANSWER = 5.0  # seconds in which a cluster's machine must
# what gRPC runs on begins with a frame of type 4 from each side (RFC 9113); an empty one
_HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _HTTP2_SETTINGS
_HOST_PORT = re.compile(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)")


class Coordinator:
    """An actor: hands out the shards, and collects what the workers report."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._leases = Leases(shards)
        self._finished = 0
        self._images = 0
        self._shares: dict[str, float] = {}

    def take(self, worker: str) -> int | None:
        return self._leases.take(worker)

    def finish(self, worker: str, shard: int) -> None:
        self._leases.finish(worker, shard)
        self._finished += 1

    def decided(self, images: int, shares: dict[str, float]) -> None:
        self._images += images
        self._shares = shares

    def release(self, worker: str) -> list[int]:
        return self._leases.release(worker)

    def news(self) -> tuple[int, int, dict[str, float], int]:
        """Since the last call: shards finished, images decided, bottlenecks; and the shards that wait for a worker."""
        news = self._finished, self._images, self._shares, self._leases.waiting
        self._finished = self._images = 0
        return news


class Worker:
    """An actor: an engine on one device."""

    def __init__(self, job: Job, name: str, coordinator: Any, device: str, threads: int) -> None:
        self._job, self._name, self._coordinator = job, name, coordinator
        self._device, self._threads = device, threads

    def run(self) -> tuple[str, Any]:
        """("speed", Speed), or ("error", what went wrong)."""
        ray, coordinator = require_ray(), self._coordinator
        try:
            return "speed", self._job.run(
                self._device,
                self._threads,
                take=lambda: ray.get(coordinator.take.remote(self._name)),
                finished=lambda shard: ray.get(coordinator.finish.remote(self._name, shard)),
                decided=coordinator.decided.remote,
            )
        except Exception as error:
            return "error", picklable(error)


@contextmanager
def cluster(config: SynthConfig) -> Iterator[None]:
    """The cluster of --ray-address, or one that is started here, while the block runs or until `run_ray` has ended.

    UserError when it cannot be reached.
    """
    ray, address = require_ray(), config.ray_address
    _probe(address)
    try:
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str | None) -> None:
    """Whether a gRPC server answers at HOST:PORT: Ray itself would try for minutes, and then end the process."""
    match = _HOST_PORT.fullmatch(address or "")
    if match is None:
        return
    advice = "give the address that `ray start` printed, or leave it out to start a cluster on this machine"
    try:
        connection = socket.create_connection((match[1], int(match[2])), timeout=_ANSWER)
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray-address {address}: nothing answers there ({error}); {advice}") from error
    with connection, connection.makefile("rb") as answer:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        try:
            connection.sendall(_HTTP2_GREETING)
            greeting = answer.read(len(_HTTP2_SETTINGS))
        except OSError:
            greeting = b""
    if greeting[3:4] != _HTTP2_SETTINGS[3:4]:
        raise UserError(f"--ray-address {address}: what listens there is not Ray; {advice}")


def run_ray(job: Job, shards: Sequence[int], decided: Decided, say: Callable[[str], None]) -> Speed:
    """Make `shards` on the cluster that is open, and leave it.

    The shards of a worker that dies are begun again by others. Workers write to `--out` themselves, so every node must
    see it: a network file system or object storage. UserError when the cluster goes away.
    """
    ray = require_ray()
    try:
        return _Cluster(ray, job, shards, decided, say).run()
    except (ray.exceptions.RaySystemError, ray.exceptions.GetTimeoutError, ConnectionError) as error:
        raise UserError(
            "the Ray cluster went away; finished shards are kept. Run the same command again to continue"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise UserError(
            "the node that hands out shards is gone; what is finished is kept. Run the same command again to continue"
        ) from error
    finally:
        ray.shutdown()  # what follows needs no workers, and must not fail with them


class _Cluster:
    def __init__(
        self, ray: Any, job: Job, shards: Sequence[int], decided: Decided, say: Callable[[str], None]
    ) -> None:
        self._ray = ray
        self._job = replace(job, config=_everywhere(job.config))
        self._decided, self._say = decided, say
        self._gpu = job.config.resolved_device().startswith("cuda")
        self._coordinator = ray.remote(num_cpus=0)(Coordinator).remote(list(shards))
        ray.get(self._coordinator.news.remote(), timeout=_START)
        self._alive: dict[Any, tuple[str, Any]] = {}
        self._speed = Speed()
        self._waiting = len(shards)
        self._started = self._deaths = 0
        self._wanted, self._looked = 0, -_LOOK_AROUND

    def run(self) -> Speed:
        self._hire()
        while self._alive:
            ended, _ = self._ray.wait(list(self._alive), timeout=_POLL)
            self._listen()
            for reference in ended:
                self._end(reference)
            self._hire()
        self._listen()
        return self._speed

    def _hire(self) -> None:
        """Start workers for which the cluster has a device and the coordinator a shard."""
        if time.monotonic() - self._looked >= _LOOK_AROUND:
            self._wanted, self._looked = self._places(), time.monotonic()
        begun = min(self._wanted - len(self._alive), self._waiting)
        for _ in range(begun if self._alive else max(1, begun) if self._waiting else 0):
            self._start()
            self._waiting -= 1

    def _places(self) -> int:
        workers = self._job.config.workers
        if workers != "auto":
            return workers
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return int(sum(node.get("GPU", 0) for node in nodes)) if self._gpu else len(nodes)

    def _start(self) -> None:
        self._started += 1
        name = f"worker {self._started}"
        if self._gpu:
            device, threads, needs = "cuda:0", 1, {"num_gpus": 1}  # Ray shows each worker only its own GPU
        else:
            total = int(self._ray.cluster_resources().get("CPU", 1))
            threads = max(1, total // max(1, self._wanted))
            device, needs = self._job.config.resolved_device(), {"num_cpus": threads}
        actor = self._ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **needs)(Worker)
        worker = actor.remote(self._job, name, self._coordinator, device, threads)
        self._alive[worker.run.remote()] = name, worker  # the handle keeps the actor alive

    def _listen(self) -> None:
        finished, images, shares, self._waiting = self._ray.get(
            self._coordinator.news.remote(), timeout=_PATIENCE
        )
        if finished:
            self._deaths = 0
        if images:
            self._decided(images, shares)

    def _end(self, reference: Any) -> None:
        name, _ = self._alive.pop(reference)
        try:
            kind, value = self._ray.get(reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError) as error:
            self._died(name, error)
            return
        if kind == "error":
            raise value
        self._speed.add(value)

    def _died(self, name: str, error: Exception) -> None:
        lost = self._ray.get(self._coordinator.release.remote(name), timeout=_PATIENCE)
        self._waiting += len(lost)
        self._deaths += 1
        self._looked = -_LOOK_AROUND  # its node may be gone too: no worker is to be sent there
        if self._deaths >= DEATHS + self._wanted:
            raise UserError(
                f"{self._deaths} workers died one after the other and no shard was finished in between "
                f"({str(error).splitlines()[0]}); run the same command again to continue"
            )
        self._say(f"{name} is gone; its {len(lost)} shards are begun again")


def _everywhere(config: Any) -> Any:
    """Other nodes and other working directories: paths from the root."""
    out = open_store(config.out).local_path
    return replace(
        config, engine=Path(config.engine).resolve(), out=str(out.resolve()) if out else str(config.out)
    )
