"""Figures of a dataset, read from the sidecars alone."""

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ubgen.dataset.reader import ShardDataset
from ubgen.dataset.shards import ShardInfo
from ubgen.errors import UserError

BINS = 50
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_NOT_SCORES = {"key", "class_index", "image", "cls", "json", "flag"}

Floats = npt.NDArray[np.float64]


def dataset_stats(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, and for every score its mean, spread, quantiles, histogram and class means.

    Keys: "images"; "class_counts", by class index; "flagged", the number of samples kept with a flag; "rejected", the
    number of rejected samples by reason; "scores", the names of the scores. Each score has an entry of its own:
    "count" (samples with a finite score), "mean", "std", "min", "max", "quantiles" (by name, "0.5" is the median),
    "histogram" ("low", "high" and the "counts" of 50 equal bins between them) and "class_means" (null for a class
    without a score). Sidecars are read one at a time; 16 bytes or so are kept of a sample.
    """
    columns = _Columns()
    reasons: Counter[str] = Counter()
    for shard in dataset.shards:
        sidecar = read_sidecar(shard)
        for entry in sidecar["samples"]:
            columns.add(entry)
        reasons.update(str(entry.get("reason", "unknown")) for entry in sidecar["rejected"])
    classes = len(dataset.classes)
    labels = np.frombuffer(columns.labels, dtype=np.int32)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"{dataset.store}: a sidecar names a class that classes.json does not have; "
            "ubgen-dataset verify finds which"
        )
    stats: dict[str, Any] = {
        "images": len(labels),
        "class_counts": np.bincount(labels, minlength=classes).tolist(),
        "flagged": columns.flagged,
        "rejected": dict(reasons.most_common()),
        "scores": sorted(columns.scores),
    }
    for name in stats["scores"]:
        stats[name] = _score_stats(columns.score(name), labels, classes)
    return stats


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


class _Columns:
    """The samples' labels and scores, as arrays that grow."""

    def __init__(self) -> None:
        self.labels = array("i")
        self.scores: dict[str, array[float]] = {}
        self.flagged = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        self.flagged += entry.get("flag") is not None
        for name, value in entry.items():
            if name not in _NOT_SCORES:
                self._add_score(name, value)
        self.labels.append(entry["class_index"])

    def score(self, name: str) -> Floats:
        """(N,), NaN where a sample has no such score."""
        self._fill(column := self.scores[name])
        return np.frombuffer(column, dtype=np.float64)

    def _add_score(self, name: str, value: object) -> None:
        column = self.scores.get(name)
        if column is None:
            column = self.scores[name] = array("d")
        if len(column) != len(self.labels):
            self._fill(column)
        column.append(np.nan if (known := number(value)) is None else known)

    def _fill(self, column: "array[float]") -> None:
        """Samples without the score that others have."""
        column.extend([np.nan] * (len(self.labels) - len(column)))


def _score_stats(values: Floats, labels: npt.NDArray[np.int32], classes: int) -> dict[str, Any]:
    finite = np.isfinite(values)
    values, labels = values[finite], labels[finite]
    stats: dict[str, Any] = {"count": len(values)}
    if not len(values):
        nothing = dict.fromkeys(("mean", "std", "min", "max", "histogram"))
        return {**stats, **nothing, "quantiles": {}, "class_means": [None] * classes}
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=values, minlength=classes)
    low, high = float(values.min()), float(values.max())
    span = (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - 0.5, high + 0.5)
    bins, edges = np.histogram(values, bins=BINS, range=span)
    return {
        **stats,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": low,
        "max": high,
        "quantiles": {
            str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        },
        "histogram": {"low": float(edges[0]), "high": float(edges[-1]), "counts": bins.tolist()},
        "class_means": [round(float(s / n), 6) if n else None for s, n in zip(sums, counts, strict=True)],
    }
