"""Pre-training of a backbone on a labelled dataset: ubgen's shards, image folders, or WebDataset tars."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubgen.core.errors import UserError
from ubgen.core.files import open_store
from ubgen.loading.settings import Augmentation
from ubgen.pretrain.config import PretrainConfig, validate

if TYPE_CHECKING:
    from ubgen.loading.loader import training_batches as training_batches

__all__ = ["Augmentation", "PretrainConfig", "pretrain", "training_batches"]


def __getattr__(name: str) -> Any:
    """`training_batches` brings PyTorch, for which `--help` need not wait."""
    if name != "training_batches":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ubgen.loading.loader import training_batches

    return training_batches


def pretrain(
    config: PretrainConfig,
    data: str | Path,
    out: Path,
    *,
    validation: str | Path | None = None,
    recipe: str = "",
    overwrite: bool = False,
    stop_after: int | None = None,
) -> bool:
    """Run to the end, or continue the unfinished run in `out`; returns whether it is finished.

    A finished run of the same configuration is left as it is. `overwrite` starts again in a used directory.
    `stop_after` ends this call after that many updates, with a checkpoint: the same call continues. Under `torchrun` or
    `accelerate launch` every process calls this; process 0 writes. On the CPU, with one process, a continued run ends
    with the same bits as an uninterrupted one. `recipe` is its name, for the model card.
    """
    validate(config)
    if stop_after is not None and stop_after < 1:
        raise UserError(f"stop_after must be positive, not {stop_after}")
    if open_store(out).local_path is None:
        raise UserError(f"--out {out}: ubgen-pretrain writes to a local directory only")
    from ubgen.pretrain.loop import open_inputs, run_pretraining  # PyTorch is imported here

    return run_pretraining(config, open_inputs(config, data, validation, recipe), out, overwrite, stop_after)
