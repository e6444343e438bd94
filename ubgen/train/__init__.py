"""Fine-tuning the generator by reward gradients: the LoRA, the discriminator, and the loop that plays them."""

from ubgen.train.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    NetworkPaths,
    OutputConfig,
    RolloutConfig,
    TrainConfig,
)
from ubgen.train.loop import train

__all__ = [
    "DiscriminatorConfig",
    "GeneratorConfig",
    "LossConfig",
    "NetworkPaths",
    "OutputConfig",
    "RolloutConfig",
    "TrainConfig",
    "train",
]
