"""Figures of a dataset, read from the sidecars alone."""

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ubgen.core.errors import UserError
from ubgen.dataset.reader import ShardDataset
from ubgen.dataset.shards import ShardInfo

BINS = 50
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_NOT_SCORES = {"key", "class_index", "image", "cls", "json", "flag"}
_PART = 1 << 16  # values that are copied at a time

Floats = npt.NDArray[np.float64]


def dataset_stats(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, and for every score its mean, spread, quantiles, histogram and class means.

    Keys: "images"; "class_counts", by class index; "flagged", the number of samples kept with a flag; "rejected", the
    number of rejected samples by reason; "scores", the names of the scores. Each score has an entry of its own:
    "count" (samples with a finite score), "mean", "std", "min", "max", "quantiles" (by name, "0.5" is the median),
    "histogram" ("low", "high" and the "counts" of 50 equal bins between them) and "class_means" (null for a class
    without a score). Sidecars are read one at a time; 4 to 8 bytes are kept of a sample's score.
    """
    classes = len(dataset.classes)
    figures = _Figures(classes)
    for shard in dataset.shards:
        if not figures.add(read_sidecar(shard)):
            raise UserError(
                f"{dataset.store}: a sidecar names a class that classes.json does not have; "
                "ubgen-dataset verify finds which"
            )
    return {
        "images": int(figures.class_counts.sum()),
        "class_counts": figures.class_counts.tolist(),
        "flagged": figures.flagged,
        "rejected": dict(figures.rejected.most_common()),
        "scores": sorted(figures.scores),
        **{name: figures.scores[name].stats() for name in sorted(figures.scores)},
    }


def read_sidecar(shard: ShardInfo) -> dict[str, Any]:
    """The whole sidecar, with its "samples" and "rejected"; UserError if it is damaged."""
    try:
        sidecar = json.loads(shard.store.read(shard.sidecar))
        good = all(_is_sample(entry) for entry in sidecar["samples"])
        good = good and all(isinstance(entry, dict) for entry in sidecar["rejected"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"{shard.store.address(shard.sidecar)} is damaged; ubgen-dataset verify --repair takes the shard away, "
            "and the same ubgen-synth command makes it again"
        )
    return sidecar


def number(value: object) -> float | None:
    """A score; None for what is not a finite number, which metadata of others may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if usable else None  # type: ignore[arg-type]


def _is_sample(entry: Any) -> bool:
    if not isinstance(entry, dict) or "key" not in entry:
        return False
    return type(label := entry.get("class_index")) is int and abs(label) < 2**31


class _Figures:
    """What is known of the samples so far."""

    def __init__(self, classes: int) -> None:
        self.class_counts = np.zeros(classes, np.int64)
        self.scores: dict[str, _Score] = {}
        self.flagged = 0
        self.rejected: Counter[str] = Counter()

    def add(self, sidecar: Mapping[str, Any]) -> bool:
        """False for a sidecar whose labels are not all among the classes."""
        samples, classes = sidecar["samples"], len(self.class_counts)
        labels = np.array([entry["class_index"] for entry in samples], np.int64)
        if not ((labels >= 0) & (labels < classes)).all():
            return False
        self.class_counts += np.bincount(labels, minlength=classes)
        self.flagged += sum(entry.get("flag") is not None for entry in samples)
        self.rejected.update(str(entry.get("reason", "unknown")) for entry in sidecar["rejected"])
        for name in {name for entry in samples for name in entry} - _NOT_SCORES:
            known = [number(entry.get(name)) for entry in samples]
            values = np.array([np.nan if value is None else value for value in known])
            self.scores.setdefault(name, _Score(classes)).add(values, labels)
        return True


class _Score:
    """The finite values of a score, and their number and sum in every class.

    Values are kept in float32 for as long as that loses nothing: what networks gave takes 4 bytes a sample.
    """

    def __init__(self, classes: int) -> None:
        self._values = array("f")
        self._counts = np.zeros(classes, np.int64)
        self._sums = np.zeros(classes)

    def add(self, values: Floats, labels: npt.NDArray[np.int64]) -> None:
        """Of a shard: `values` (N,), NaN where there is none, and `labels` (N,)."""
        finite = np.isfinite(values)
        values, labels = values[finite], labels[finite]
        self._counts += np.bincount(labels, minlength=len(self._counts))
        self._sums += np.bincount(labels, weights=values, minlength=len(self._sums))
        with np.errstate(over="ignore"):
            lossless = bool((values.astype(np.float32) == values).all())
        if self._values.typecode == "f" and not lossless:
            self._values = array("d", self._values)
        self._values.frombytes(values.astype(self._values.typecode).tobytes())

    def stats(self) -> dict[str, Any]:
        """See `dataset_stats`. Copies no more than a part of the values at a time, as there may be many."""
        values = np.frombuffer(self._values, self._values.typecode)
        stats: dict[str, Any] = {"count": len(values)}
        pairs = list(zip(self._sums, self._counts, strict=True))
        means = [round(float(s / n), 6) if n else None for s, n in pairs]
        if not len(values):
            nothing = dict.fromkeys(("mean", "std", "min", "max", "histogram"))
            return {**stats, **nothing, "quantiles": {}, "class_means": means}
        values.sort()
        mean = math.fsum(part.sum() for part in _parts(values)) / len(values)
        squares = math.fsum(np.square(part - mean).sum() for part in _parts(values))
        return {
            **stats,
            "mean": mean,
            "std": math.sqrt(squares / len(values)),
            "min": float(values[0]),
            "max": float(values[-1]),
            "quantiles": {str(q): _quantile(values, q) for q in QUANTILES},
            "histogram": _histogram(values),
            "class_means": means,
        }


def _parts(values: npt.NDArray[Any]) -> Iterator[Floats]:
    for start in range(0, len(values), _PART):
        yield values[start : start + _PART].astype(np.float64)


def _quantile(ordered: npt.NDArray[Any], quantile: float) -> float:
    """Between the two values next to it, linearly."""
    place = quantile * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * (place - below)


def _histogram(ordered: npt.NDArray[Any]) -> dict[str, Any]:
    low, high = float(ordered[0]), float(ordered[-1])
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    counts = np.sum([np.histogram(part, BINS, (low, high))[0] for part in _parts(ordered)], axis=0)
    return {"low": low, "high": high, "counts": counts.tolist()}
