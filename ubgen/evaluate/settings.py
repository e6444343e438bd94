"""The settings of transfer and few-shot; free of PyTorch, so that a command's `--help` is quick."""

from dataclasses import dataclass

from ubgen.core.errors import UserError


@dataclass(frozen=True)
class TransferSettings:
    """The linear probe of the trex toolbox."""

    seeds: int = 5
    """Repetitions; a seed draws the validation images and guides the search of C. Figures are means."""
    seed: int = 0
    """The first seed; the others follow it."""
    trials: int = 30
    """Values of C that are tried in each search."""

    def __post_init__(self) -> None:
        for name in ("seeds", "trials"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class FewShotSettings(TransferSettings):
    """The same probe, trained on a share of the training images. A seed also draws the share."""

    seeds: int = 3
    fractions: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    """Shares of train+val, of each class, at least 2 images per class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(f"--fractions must be above 0 and at most 1, not {self.fractions}")
        if len(set(self.fractions)) < len(self.fractions):
            raise UserError(f"--fractions names one twice: {self.fractions}")
