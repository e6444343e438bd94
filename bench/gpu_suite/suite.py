"""What a part of the suite works with: its settings, its clock, and the file that its results go to at once."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_suite.sizes import FULL, TINY, Sizes
from ubgen.benchmark import Timing
from ubgen.core.stage import atomic_write


@dataclass(frozen=True)
class Settings:
    """`out` receives the results, `work` everything that may be thrown away; `end` is on `time.monotonic`'s clock."""

    out: Path
    work: Path
    device: str
    small: bool
    end: float
    variants: tuple[str, ...] = ()

    @property
    def sizes(self) -> Sizes:
        return TINY if self.small else FULL

    @property
    def repository(self) -> Path:
        return Path(__file__).resolve().parents[2]


@dataclass
class Suite:
    """One part's run. Every row, skipped item and failure is on disk as soon as it is known."""

    part: str
    settings: Settings
    end: float
    content: dict[str, Any] = field(default_factory=lambda: {"rows": [], "skipped": [], "facts": {}})

    @property
    def device(self) -> str:
        return self.settings.device

    @property
    def sizes(self) -> Sizes:
        return self.settings.sizes

    @property
    def small(self) -> bool:
        return self.settings.small

    def left(self) -> float:
        """Seconds until the part's time is up."""
        return self.end - time.monotonic()

    def share(self, part: float) -> float:
        """Seconds for one measurement, of those that are left."""
        return min(part * self.left(), 0.2) if self.small else part * self.left()

    def add(self, timing: Timing | None = None, **row: Any) -> None:
        """A result; `timing` gives it "ms" (the median), "q1", "q3" and "rounds"."""
        if timing is not None:
            row |= {"ms": timing.median, "q1": timing.q1, "q3": timing.q3, "rounds": timing.rounds}
        self.content["rows"].append(row)
        self.write()

    def fact(self, **facts: Any) -> None:
        """Something that belongs to the whole part."""
        self.content["facts"] |= facts
        self.write()

    def skip(self, what: str, reason: str) -> None:
        self.content["skipped"].append({"what": what, "reason": reason})
        self.write()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A failure inside is recorded, with its reason, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.skip(what, reason(error))

    def restart(self, end: float) -> None:
        """Measuring begins; what was before was compilation."""
        self._started, self.end = time.monotonic(), end

    def run(self, part: "Callable[[Suite], None]") -> None:
        self.restart(self.end)
        self.write()
        try:
            part(self)
        except Exception as error:
            traceback.print_exc()
            self.content["error"] = reason(error)
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        self.write()

    def write(self) -> None:
        atomic_write(self.settings.work / f"{self.part}.json", json.dumps(self.content, indent=1) + "\n")


def reason(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
