"""How much of its weight the entire alignment loss has: as much as similarity has risen."""

from ubgen.train.config import LossConfig

MOMENTUM = 0.9  # of the running mean, an update: the single batch says too little


class Pace:
    """The adversary comes in as the images' CLIP similarity rises over the base generator's, and gives way where it
    falls back, so that it takes no more than was gained. `losses.entire_rise` has the two ends.
    """

    def __init__(self, losses: LossConfig) -> None:
        assert losses.entire_rise is not None  # the caller asks for a pace only where there is one
        self._low, self._high = losses.entire_rise
        self._base = self._count = 0.0
        self._mean: float | None = None

    def observe_base(self, similarity: float) -> None:
        """The mean of one update of the warm-up, whose images are the base generator's."""
        self._base = (self._base * self._count + similarity) / (self._count + 1)
        self._count += 1

    def observe(self, similarity: float) -> None:
        """The mean of one update after it."""
        before = self._base if self._mean is None else self._mean
        self._mean = MOMENTUM * before + (1 - MOMENTUM) * similarity

    def share(self) -> float:
        """0..1: of the entire alignment loss's weight, for the next update."""
        rise = 0.0 if self._mean is None else self._mean - self._base
        return min(1.0, max(0.0, (rise - self._low) / (self._high - self._low)))

    def state_dict(self) -> dict[str, float | None]:
        return {"base": self._base, "count": self._count, "mean": self._mean}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self._base, self._count = state["base"] or 0.0, state["count"] or 0.0
        self._mean = state["mean"]
