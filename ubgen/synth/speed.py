"""How fast a dataset was made, over all invocations of the command: parts of a static run, and continued runs.

An invocation that made images leaves a file beside the shards when it ends. The one that finishes the dataset adds
them up for the manifest, and deletes them. One that fails or is killed while it makes images leaves none: its shards
are used, and the figures cover the images that the others made.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ubgen.dataset import Store

Points = list[tuple[float, int]]
SPEED_FILES = "speed-*.json"
_LIMIT = 512  # points of a curve


@dataclass
class Speed:
    """`seconds` of all workers, the part of them that each stage was `busy`, and in which the others waited for it.

    `points` are Unix times with the images made by then, the first when the workers began, the last when they had
    ended. A single worker knows none.
    """

    images: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    bottleneck: dict[str, float] = field(default_factory=dict)
    points: Points = field(default_factory=list)

    def add(self, other: "Speed") -> None:
        """Another worker's figures, without points."""
        self.images += other.images
        self.seconds += other.seconds
        for mine, theirs in ((self.busy, other.busy), (self.bottleneck, other.bottleneck)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.points[-1][0] - self.points[0][0], 1e-9) if self.points else 0.0


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of their sum; nothing where that is zero."""
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}


class History:
    """Images made against time, with few points however long it takes: of many, every other one is dropped."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._points: Points = []
        self._images = 0
        self._every = 0.5
        self._begun, self._start = time.time(), time.monotonic()
        self._report = report
        self.add(0)

    def add(self, images: int) -> None:
        self._images += images
        now = self._begun + time.monotonic() - self._start
        if not self._points or now >= self._points[-1][0] + self._every:
            self._points.append((now, self._images))
            if len(self._points) > _LIMIT:
                self._points, self._every = self._points[::2], 2 * self._every
        self._report(self._images)

    def points(self) -> Points:
        """All of them, once the workers have ended."""
        return [*self._points, (self._begun + time.monotonic() - self._start, self._images)]


def leave(store: Store, speed: Speed) -> None:
    """Under a new name: parts may be queued twice, or be other parts than before."""
    store.write(f"speed-{uuid.uuid4().hex}.json", json.dumps(asdict(speed)))


def speed_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, SPEED_FILES)]


def total(store: Store, files: Iterable[str]) -> dict[str, Any]:
    """The manifest's entry, from what invocations left; a damaged file does not count."""
    runs = [run for run in (_read(store, name) for name in files) if run]
    whole = Speed()
    for run in runs:
        whole.add(run)
    curve = throughput([run.points for run in runs])
    return {
        "images": whole.images,
        "images_per_second": whole.images / max(curve[-1][0], 1e-9) if curve else 0.0,
        "worker_seconds": whole.seconds,
        "busy_seconds": whole.busy,
        "bottleneck_shares": shares(whole.bottleneck),
        "throughput": curve,
    }


def _read(store: Store, name: str) -> Speed | None:
    try:
        speed = Speed(**json.loads(store.read(name)))
        speed.points = [(float(when), int(images)) for when, images in speed.points]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return speed if speed.points else None


def throughput(runs: Collection[Points]) -> Points:
    """One curve for all `runs`: seconds in which any of them was at work, and the images made by then.

    Hours in which none was are cut out. The clocks of the machines should agree to about a second.
    """
    made = list[tuple[float, int]]()
    idle = end = min((points[0][0] for points in runs), default=0.0)
    for points in sorted(runs):
        idle += max(0.0, points[0][0] - end)
        end = max(end, points[-1][0])
        for (_, before), (when, images) in pairwise([points[0], *points]):
            made.append((round(when - idle, 3), images - before))
    times, counts = zip(*sorted(made), strict=True) if made else ((), ())
    curve = list(dict(zip(times, accumulate(counts), strict=True)).items())
    chosen = np.linspace(0, len(curve) - 1, min(len(curve), _LIMIT)).round().astype(int)
    return [curve[i] for i in chosen]
