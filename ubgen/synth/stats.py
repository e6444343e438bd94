"""Figures of a dataset, read from the sidecars."""

from typing import Any

import numpy as np

from ubgen.dataset import ShardDataset

SCORES = ("clip_similarity", "quality")


def dataset_stats(dataset: ShardDataset) -> dict[str, Any]:
    """For each score: mean, standard deviation, smallest, largest, and the mean of every class by its index."""
    labels = np.fromiter((entry["class_index"] for entry in dataset.entries()), dtype=np.int64)
    values = {name: np.fromiter((e[name] for e in dataset.entries()), dtype=np.float64) for name in SCORES}
    counts = np.bincount(labels, minlength=len(dataset.classes))
    stats: dict[str, Any] = {"images": len(labels)}
    for name, scores in values.items():
        by_class = np.bincount(labels, weights=scores, minlength=len(counts)) / np.maximum(counts, 1)
        stats[name] = {
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "min": float(scores.min()),
            "max": float(scores.max()),
            "class_means": [round(float(mean), 6) for mean in by_class],
        }
    return stats
