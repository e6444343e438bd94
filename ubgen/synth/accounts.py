"""How long a dataset took, over all invocations of the command that made it: parts of a static run, and continued runs.

An invocation that made images leaves a file beside the shards when it ends. The one that finishes the dataset adds
them up for the manifest, and takes them away. One that fails or is killed while it makes images leaves none: its shards
are used, and the figures tell of the images that the others made.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ubgen.dataset import Store

Points = list[tuple[float, int]]
_FILE = re.compile(r"\.account-[0-9a-f]{32}\.json")
_LIMIT = 512  # points of a curve


@dataclass
class Account:
    """Seconds each stage was busy, and seconds for which it was the one that the others waited for."""

    images: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    bottleneck: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Account") -> None:
        """Of several workers: sums."""
        self.images += other.images
        self.seconds += other.seconds
        for mine, theirs in ((self.busy, other.busy), (self.bottleneck, other.bottleneck)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value

    def shares(self) -> dict[str, float]:
        """Share of the time in which each stage was the bottleneck; they sum to 1."""
        return shares_of(self.bottleneck)


def shares_of(seconds: dict[str, float]) -> dict[str, float]:
    """Of their sum; nothing where that is zero."""
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}


@dataclass(frozen=True)
class Record:
    """`account` of the workers; `begun` is the Unix time at which they began, and `points` are seconds since then with
    the images made by then, the last when they ended."""

    begun: float = 0.0
    account: Account = field(default_factory=Account)
    points: Points = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.points[-1][0] if self.points else 0.0

    @property
    def images_per_second(self) -> float:
        return self.account.images / max(self.seconds, 1e-9)

    def speed(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "images": self.account.images,
            "images_per_second": self.images_per_second,
            "worker_seconds": self.account.seconds,
            "busy_seconds": self.account.busy,
            "bottleneck_shares": self.account.shares(),
            "throughput": self.points,
        }


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
        now = time.monotonic() - self._start
        if not self._points or now >= self._points[-1][0] + self._every:
            self._points.append((round(now, 3), self._images))
            if len(self._points) > _LIMIT:
                self._points, self._every = self._points[::2], 2 * self._every
        self._report(self._images)

    def end(self, account: Account) -> Record:
        """All of it, once the workers have ended."""
        last = round(time.monotonic() - self._start, 3), self._images
        return Record(self._begun, account, [*self._points, last])


def leave(store: Store, record: Record) -> None:
    """Under a new name: parts may be queued twice, or be other parts than before."""
    store.write(f".account-{uuid.uuid4().hex}.json", json.dumps(asdict(record)))


def left(store: Store) -> dict[str, Record]:
    """What invocations left, by file name; files that are not as `leave` writes them do not count."""
    read = {name: _read(store, name) for name in account_files(store.names())}
    return {name: record for name, record in read.items() if record}


def account_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if _FILE.fullmatch(name)]


def _read(store: Store, name: str) -> Record | None:
    try:
        entry = json.loads(store.read(name))
        points = [(float(seconds), int(images)) for seconds, images in entry["points"]]
        return Record(float(entry["begun"]), Account(**entry["account"]), points)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def together(records: Collection[Record]) -> Record:
    """Accounts added up, and one curve over the time in which any of them was at work.

    Hours in which none was are cut out. The clocks of the machines should agree to about a second.
    """
    ordered = sorted((record for record in records if record.points), key=lambda record: record.begun)
    account = Account()
    for record in ordered:
        account.add(record.account)
    return Record(ordered[0].begun, account, _added(ordered)) if ordered else Record()


def _added(ordered: Collection[Record]) -> Points:
    """Images made by all, at the moments of any of them."""
    starts = _starts(ordered)
    times = [start + np.array([s for s, _ in r.points]) for start, r in zip(starts, ordered, strict=True)]
    moments = np.unique(np.concatenate(times))
    moments = moments[np.linspace(0, len(moments) - 1, min(len(moments), _LIMIT)).round().astype(int)]
    images = np.zeros(len(moments))
    for seconds, record in zip(times, ordered, strict=True):
        images += np.interp(moments, seconds, [made for _, made in record.points])
    return [(round(s, 3), round(n)) for s, n in zip(moments.tolist(), images.tolist(), strict=True)]


def _starts(ordered: Collection[Record]) -> list[float]:
    """Seconds from the beginning of the first to that of each, without those in which none was at work."""
    starts = list[float]()
    cut = end = min(record.begun for record in ordered)
    for record in ordered:
        cut += max(0.0, record.begun - end)
        end = max(end, record.begun + record.seconds)
        starts.append(record.begun - cut)
    return starts
