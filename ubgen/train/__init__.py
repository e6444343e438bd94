"""Fine-tuning the generator by reward gradients: the LoRA, the discriminator, and the loop that plays them."""

from pathlib import Path
from typing import TYPE_CHECKING

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError
from ubgen.core.files import open_store
from ubgen.train.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    NetworkPaths,
    OutputConfig,
    RolloutConfig,
    TrainConfig,
    check_networks,
    require_networks,
    validate,
)

if TYPE_CHECKING:
    from ubgen.train.logging import GridJudge

__all__ = [
    "DiscriminatorConfig",
    "GeneratorConfig",
    "LossConfig",
    "NetworkPaths",
    "OutputConfig",
    "RolloutConfig",
    "TrainConfig",
    "train",
    "validate",
]


def train(
    config: TrainConfig,
    out: Path,
    *,
    overwrite: bool = False,
    stop_after: int | None = None,
    judge: "GridJudge | None" = None,
) -> bool:
    """Run to the end, or continue the unfinished run in `out`; returns whether it is finished.

    A finished run of the same configuration is left as it is. `overwrite` starts again in a used directory.
    `stop_after` ends this call after that many updates, with a checkpoint: the same call continues. Under
    `accelerate launch` every process calls this; process 0 writes. On the CPU a continued run ends with the same bits
    as an uninterrupted one. `out` is changed only once all networks are loaded. `judge` adds measures of the sample
    grids to the log.
    """
    validate(config)
    require_networks(config)
    if stop_after is not None and stop_after < 1:
        raise UserError(f"stop_after must be positive, not {stop_after}")
    if open_store(out).local_path is None:
        raise UserError(f"--out {out}: ubgen-train writes to a local directory only")
    classes = load_classes(config.classes)
    check_networks(config)  # PyTorch is imported from here on: until then every answer is quick
    from ubgen.train.loop import run_training

    return run_training(config, classes, out, overwrite, stop_after, judge)
