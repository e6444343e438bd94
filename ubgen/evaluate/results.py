"""What one evaluation yields: figures with their intervals, and predictions sample by sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A measured number. `value` None: undefined, such as the accuracy of a partition without an image."""

    value: float | None
    low: float | None = None
    """Lower end of the 95 % interval, where there is one."""
    high: float | None = None
    unit: str = "%"


@dataclass(frozen=True)
class Result:
    """One evaluation of one backbone on one dataset."""

    evaluation: str
    """ "transfer", "fewshot", "bias" or "val"."""
    dataset: str
    """Its short name, such as "aircraft" or "cue-conflict"."""
    figures: Mapping[str, Figure]
    """The first one is the figure that tables show."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Images, classes, and what else is counted."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What explains the figures, as JSON: chosen settings, figures of each seed."""
    predictions: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    """Columns of equal length, one row for each test sample (and seed): at least "sample", "label", "predicted" and
    "correct"."""
