"""Figures of a dataset, read from the sidecars alone."""

from array import array
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from ubgen.core.errors import UserError
from ubgen.dataset.reader import ShardDataset

BINS = 50
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

Floats = npt.NDArray[np.float64]


def dataset_stats(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, and for every score its mean, spread, quantiles, histogram and class means.

    Keys: "images"; "class_counts", by class index; "flagged", the number of samples kept with a flag; "rejected", the
    number of rejected samples by reason; "scores", the names of the scores. Each score has an entry of its own:
    "count" (samples with a finite score), "mean", "std", "min", "max", "quantiles" (by name, "0.5" is the median),
    "histogram" ("low", "high" and the "counts" of 50 equal bins between them) and "class_means" (null for a class
    without a score). Sidecars are read one at a time; 12 bytes are kept of a sample's score.
    """
    classes = len(dataset.classes)
    class_counts = np.zeros(classes, np.int64)
    scores: dict[str, _Score] = {}
    rejected: Counter[str] = Counter()
    flagged = 0
    for shard in dataset.shards:
        samples, ledger = shard.read()
        labels = np.array([sample.class_index for sample in samples], np.int64)
        if (labels >= classes).any():
            raise UserError(
                f"{dataset.store}: a sidecar names a class that classes.json does not have; "
                "ubgen-dataset verify finds which"
            )
        class_counts += np.bincount(labels, minlength=classes)
        flagged += sum(sample.flag is not None for sample in samples)
        rejected.update(str(entry.get("reason", "unknown")) for entry in ledger)
        for sample in samples:
            for name, value in sample.scores.items():
                scores.setdefault(name, _Score()).add(value, sample.class_index)
    return {
        "images": int(class_counts.sum()),
        "class_counts": class_counts.tolist(),
        "flagged": flagged,
        "rejected": dict(rejected.most_common()),
        "scores": sorted(scores),
        **{name: scores[name].stats(classes) for name in sorted(scores)},
    }


class _Score:
    """The values of a score, and their classes, as compact arrays."""

    def __init__(self) -> None:
        self._values = array("d")
        self._labels = array("i")

    def add(self, value: float | None, label: int) -> None:
        if value is not None and abs(value) < 1e300:  # sums of larger ones, which no network gives, overflow
            self._values.append(value)
            self._labels.append(label)

    def stats(self, classes: int) -> dict[str, Any]:
        """See `dataset_stats`."""
        values, labels = np.frombuffer(self._values), np.frombuffer(self._labels, np.int32)
        counts = np.bincount(labels, minlength=classes)
        sums = np.bincount(labels, weights=values, minlength=classes)
        means = [round(float(s / n), 6) if n else None for s, n in zip(sums, counts, strict=True)]
        if not len(values):
            nothing = dict.fromkeys(("mean", "std", "min", "max", "histogram"))
            return {"count": 0, **nothing, "quantiles": {}, "class_means": means}
        values.sort()
        return {
            "count": len(values),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values[0]),
            "max": float(values[-1]),
            "quantiles": dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True)),
            "histogram": _histogram(values),
            "class_means": means,
        }


def _histogram(ordered: Floats) -> dict[str, Any]:
    low, high = float(ordered[0]), float(ordered[-1])
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    return {"low": low, "high": high, "counts": np.histogram(ordered, BINS, (low, high))[0].tolist()}
