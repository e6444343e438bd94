"""Jobs on all cores, each on one, with their logs and the time that is left."""

import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from plan import SECONDS, Job
from rich.console import Console

from ubgen.core.errors import UserError
from ubgen.core.files import atomic_write

TIMES = "times.json"


class Crew:
    """Runs jobs as soon as what they need is there, in their order. After the first failure no other is begun."""

    def __init__(self, jobs: Sequence[Job], out: Path, workers: int, weight: float, console: Console) -> None:
        self._jobs, self._out, self._workers, self._weight = jobs, out, workers, weight
        self._console = console
        self._begun = {job.name for job in jobs if job.done}
        self._running: dict[str, tuple[Job, float]] = {}
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        path = out / TIMES
        self._times: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def work(self, after: Callable[[], None]) -> None:
        """Run everything. `after` is called after each finished job, one at a time. UserError where a job fails."""
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        done = len(self._begun)
        self._say(f"{done} of {len(self._jobs)} steps were finished before; {self._left()}")
        with ThreadPoolExecutor(self._workers) as pool:
            for worker in [pool.submit(self._worker, after) for _ in range(self._workers)]:
                worker.result()
        if self._failure:
            raise self._failure

    def _worker(self, after: Callable[[], None]) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                self._play(job)
            except Exception as error:
                with self._changed:
                    self._failure = self._failure or error
            with self._changed:
                del self._running[job.name]
                if not self._failure:
                    self._finished(job, time.monotonic() - start)
                    after()
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            while not self._failure:
                waiting = [job for job in self._jobs if job.name not in self._begun]
                for job in waiting:
                    if all(need.is_file() for need in job.needs):
                        self._begun.add(job.name)
                        self._running[job.name] = job, time.monotonic()
                        return job
                if not waiting:
                    return None
                self._changed.wait()
            return None

    def _play(self, job: Job) -> None:
        if callable(job.work):
            job.work()
            return
        log = self._out / "logs" / f"{job.name.replace(' ', '-')}.log"
        with log.open("ab") as file:
            status = subprocess.run(
                list(map(str, job.work)),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).returncode
        if status or not job.done:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"{job.name} failed: {said[-1]} ({log})")

    def _finished(self, job: Job, seconds: float) -> None:
        self._times[job.name] = seconds
        atomic_write(self._out / TIMES, json.dumps(self._times, indent=1) + "\n")
        count = sum(job.done for job in self._jobs)
        took = timedelta(seconds=round(seconds))
        self._say(f"{count}/{len(self._jobs)} {job.name}: {took}; {self._left()}")

    def _left(self) -> str:
        """From the median time of the runs of each kind; of a kind that has none yet, a guess."""
        now, seconds = time.monotonic(), 0.0
        known: dict[str, list[float]] = {}
        for job in self._jobs:
            if job.name in self._times:
                known.setdefault(job.kind, []).append(self._times[job.name])
        for job in self._jobs:
            if not job.done:
                usual = (
                    statistics.median(known[job.kind])
                    if job.kind in known
                    else SECONDS[job.kind] * self._weight
                )
                begun = self._running.get(job.name)
                seconds += max(0.0, usual - (now - begun[1])) if begun else usual
        return f"about {timedelta(seconds=round(seconds / self._workers))} left"

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
