"""The settings of transfer and few-shot; free of PyTorch, so that a command's `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ubgen.core.errors import UserError
from ubgen.loading.settings import Loader


@dataclass(frozen=True)
class EvalSettings:
    """Which backbone is evaluated on what, and how its features are computed."""

    backbone: str
    """A directory of ubgen-pretrain; timm:MODEL@FILE, a timm network with a checkpoint; or random:MODEL@SEED."""
    data: Path
    """Directory that holds the datasets, one directory each."""
    out: Path
    """Directory for the results; it takes in those of several commands for one backbone."""
    datasets: str = ""
    """Names with commas between; by default those of DATA/benchmarks.json, or else the paper's."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run with a moving average of the weights: that average, or the last weights."""
    classes: str | None = None
    """What the outputs of a checkpoint mean: a class list, or a file with one class id a line."""
    image_size: int | None = None
    """Side of the input in pixels, where it is not the network's own."""
    device: str = "auto"
    """"auto" uses a GPU if there is one; cpu, cuda, cuda:1."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast's type for the features; "auto": bf16 on a GPU, float32 ("no") on a CPU."""
    batch_size: int = 128
    """Images that pass the network together."""
    threads: int = 0
    """Loader threads; 0: one for each processor."""
    loader: Loader = "auto"
    """What decodes: threads, or NVIDIA DALI."""
    features: Path | None = None
    """Where features are kept, so that they are computed once; OUT/features if not given. Runs may share it."""
    overwrite: bool = False
    """Do the named evaluations again; another backbone's results are removed."""

    def check(self) -> None:
        """UserError for values that make no sense."""
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {value}")


@dataclass(frozen=True)
class Probing:
    """How transfer datasets are found and split."""

    splits: Literal["toolbox", "paper"] = "toolbox"
    """Validation images: 20 % of each class, drawn for each seed, or as many as in the paper's Table 7."""
    download: bool = False
    """Let torchvision download datasets that are missing, where it can."""


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
