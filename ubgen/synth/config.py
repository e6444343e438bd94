"""Settings of a synthesis run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ubgen.errors import UserError


@dataclass(frozen=True)
class SynthConfig:
    """Which engine makes how many images of which classes."""

    engine: Path
    """Directory made by ubgen-export."""
    classes: str
    """A shipped class list ("imagenet1k", "miniature", ...) or a UTF-8 text file, one class per line."""
    per_class: int
    """Images of each class."""
    out: Path
    """Directory of the dataset; an unfinished one is continued."""
    seed: int = 0
    """Run seed; with the class and image index it fixes each image's noise."""
    batch: int | Literal["best"] = "best"
    """Images at a time; "best" is what the engine was made for. It does not change the images."""
    steps: int = 50
    """PNDM sampling steps."""
    guidance: float = 2.0
    """Classifier-free guidance scale."""
    shard_size: int = 256
    """Images in a shard, the unit of resuming."""
    format: Literal["jpg", "png"] = "jpg"
    """JPEG of quality 95, or PNG."""
    device: str = "cpu"
    """Where the engine runs."""
    overwrite: bool = False
    """Throw away what the output directory holds and start again."""

    def check(self) -> None:
        """UserError naming the first option that is out of range."""
        smallest = {"per-class": self.per_class, "shard-size": self.shard_size, "steps": self.steps}
        if self.batch != "best":
            smallest["batch"] = self.batch
        for name, value in smallest.items():
            if value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in 0..2^63-1, not {self.seed}")
        if not abs(self.guidance) < 1e6:  # also refuses NaN
            raise UserError(f"--guidance must be a finite number, not {self.guidance}")
