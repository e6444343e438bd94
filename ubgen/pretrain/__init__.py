"""Pre-training of a backbone on a labelled dataset: ubgen's shards, image folders, or WebDataset tars."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ubgen.pretrain.loader import training_batches as training_batches

__all__ = ["training_batches"]


def __getattr__(name: str) -> Any:
    """`training_batches` brings PyTorch, for which `--help` need not wait."""
    if name != "training_batches":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ubgen.pretrain.loader import training_batches

    return training_batches
