"""Which images are good enough, and what becomes of those that are not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import Item, identity_of

BROKEN = ("not finite", "constant")
"""Reasons for which an image is never kept."""


@dataclass(frozen=True)
class Made:
    """`pixels` (H,W,3) uint8, on the host unless they are encoded on a GPU; cosine similarity to "photo of {class}" in
    CLIP's space; quality in [1, 5]; `broken` names why the image is none at all ("not finite", "constant"); CLIP image
    `features` (D,) float16, L2-normalised."""

    pixels: Tensor
    clip_similarity: float
    quality: float
    broken: str | None = None
    features: np.ndarray | None = None


@dataclass(frozen=True)
class Chosen:
    """The image of `item` that enters the dataset; `flag` is why it is not good enough; `rejected` are ledger lines."""

    item: Item
    made: Made
    flag: str | None
    rejected: tuple[dict[str, Any], ...]


class Exhausted(UserError):
    """No attempt at the image of `item` can be kept; `rejected` are its ledger lines."""

    def __init__(self, message: str, item: Item, rejected: tuple[dict[str, Any], ...]) -> None:
        super().__init__(message)
        self.item = item
        self.rejected = rejected


@dataclass
class _Pending:
    """What is known of an image that was rejected so far: its attempts, and the best of them."""

    best: tuple[Item, Made, str]
    rejected: list[dict[str, Any]]


class Selection:
    """Judges images. What it decides follows from the images alone, not from the order in which they come."""

    def __init__(self, config: SynthConfig) -> None:
        self._config = config
        self._pending: dict[int, _Pending] = {}

    def judge(self, made: Iterable[tuple[Item, Made]]) -> tuple[list[Chosen], list[Item]]:
        """The images that are decided, and the items to be drawn again.

        `Exhausted` for an image of which no attempt is good enough, where that fails the run or all were broken.
        """
        chosen, again = list[Chosen](), list[Item]()
        for item, result in made:
            reason = self._reason(result)
            if reason is None:
                pending = self._pending.pop(item.position, None)
                chosen.append(Chosen(item, result, None, tuple(pending.rejected) if pending else ()))
                continue
            pending = self._remember(item, result, reason)
            if item.attempt + 1 < self._config.attempts:
                again.append(replace(item, attempt=item.attempt + 1))
            else:
                chosen.append(self._exhausted(item, pending))
        return chosen, again

    def _reason(self, made: Made) -> str | None:
        if made.broken:
            return made.broken
        if not math.isfinite(made.clip_similarity) or not math.isfinite(made.quality):
            return "not finite"
        if _below(made.clip_similarity, self._config.min_similarity):
            return "similarity"
        return "quality" if _below(made.quality, self._config.min_quality) else None

    def _remember(self, item: Item, made: Made, reason: str) -> _Pending:
        best = (item, made, reason)
        pending = self._pending.get(item.position)
        if pending is None or self._rank(made, reason) > self._rank(*pending.best[1:]):
            pixels = made.pixels.clone()  # else it would keep its whole batch in memory
            if pixels.is_cuda:  # other streams use the batch's memory again, and read the copy
                torch.cuda.current_stream(pixels.device).synchronize()
            best = (item, replace(made, pixels=pixels), reason)
        else:
            best = pending.best
        rejected = pending.rejected if pending else []
        rejected.append(_ledger_line(self._config.seed, item, made, reason))
        self._pending[item.position] = pending = _Pending(best, rejected)
        return pending

    def _rank(self, made: Made, reason: str) -> tuple[bool, float]:
        """By how little an image misses the threshold that it misses most, each score over its range."""
        if reason in BROKEN:
            return False, 0.0
        similarity = _shortfall(made.clip_similarity, self._config.min_similarity, 2.0)
        return True, -max(similarity, _shortfall(made.quality, self._config.min_quality, 4.0))

    def _exhausted(self, item: Item, pending: _Pending) -> Chosen:
        kept, made, reason = pending.best
        if self._config.exhausted == "fail" or reason in BROKEN:
            raise Exhausted(
                f"class {item.class_index}, image {item.image_index}: none of {self._config.attempts} attempts is good "
                f"enough (the best: {_describe(made, reason)}); lower the threshold, raise --attempts, or look at the "
                "class's prompt",
                item,
                tuple(pending.rejected),
            )
        del self._pending[item.position]
        rejected = tuple(line for line in pending.rejected if line["attempt"] != kept.attempt)
        return Chosen(kept, made, reason, rejected)


def _below(score: float, threshold: float | None) -> bool:
    return threshold is not None and score < threshold


def _shortfall(score: float, threshold: float | None, scale: float) -> float:
    return 0.0 if threshold is None else max(0.0, (threshold - score) / scale)


def _describe(made: Made, reason: str) -> str:
    if reason in BROKEN:
        return reason
    return f"CLIP similarity {made.clip_similarity:.3f}, Q-Align score {made.quality:.2f}"


def _ledger_line(seed: int, item: Item, made: Made, reason: str) -> dict[str, Any]:
    return {
        **identity_of(seed, item),
        "reason": reason,
        "clip_similarity": _finite(made.clip_similarity),
        "quality": _finite(made.quality),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
