"""How long one call takes, of several ways to do the same thing that take turns in one process."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

TURN = 0.02  # seconds: short calls are repeated so often within a turn
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median and quartiles over `rounds` turns, each the mean of `calls` calls in a row.

    `cpu` is the median of the CPU time of all the process's threads, which other work on the machine hardly changes.
    """

    median: float
    q1: float
    q3: float
    rounds: int
    calls: int
    cpu: float

    @staticmethod
    def of(times: Sequence[float], cpu_times: Sequence[float], calls: int = 1) -> "Timing":
        """Of all turns, in milliseconds a call."""
        if len(times) == 1:
            return Timing(times[0], times[0], times[0], 1, calls, cpu_times[0])
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
        return Timing(median, q1, q3, len(times), calls, statistics.median(cpu_times))

    def per_second(self, units: float) -> float:
        """What is done in a second when a call does `units`."""
        return 1000 * units / self.median


def compare(
    sides: Mapping[str, Callable[[], object]],
    device: str | torch.device = "cpu",
    *,
    seconds: float = 10.0,
    least: int = 5,
    warm: bool = False,
) -> dict[str, Timing]:
    """Time every side; they take turns, and the one that begins changes from round to round.

    Each is called twice before anything is counted, so that compilation, handles and caches are in place; with `warm`
    that has been done already, and a turn is one call. Rounds go on for about `seconds` in all, but at least `least` of
    them are made. On a GPU the time is that between two events on the current stream, which nothing else should use
    meanwhile.
    """
    calls = {name: 1 if warm else calls_in_a_turn(call, device) for name, call in sides.items()}
    order, times, cpu_times = (
        list(sides),
        defaultdict[str, list[float]](list),
        defaultdict[str, list[float]](list),
    )
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or (time.perf_counter() < end and rounds < MOST_ROUNDS):
        for name in order:
            before = time.process_time()
            times[name].append(milliseconds(sides[name], calls[name], device))
            cpu_times[name].append(1000 * (time.process_time() - before) / calls[name])
        order, rounds = order[1:] + order[:1], rounds + 1
    return {name: Timing.of(times[name], cpu_times[name], calls[name]) for name in sides}


def milliseconds(call: Callable[[], object], count: int, device: str | torch.device) -> float:
    """Mean time of `count` calls in a row."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1000 * (time.perf_counter() - start) / count
    with torch.cuda.device(device):  # else the events would lie on the first GPU's stream
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / count


def calls_in_a_turn(call: Callable[[], object], device: str | torch.device) -> int:
    """How often a short call is repeated; calls it twice."""
    call()
    return max(1, round(1000 * TURN / max(milliseconds(call, 1, device), 1e-3)))
