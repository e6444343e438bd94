"""Plain functions on features and predictions: what is computed, apart from where the arrays come from."""

from typing import TYPE_CHECKING, Any

from ubgen.measures.bias import background_gap, context_score, shape_bias
from ubgen.measures.distance import Manifold, frechet, kid, manifold
from ubgen.measures.diversity import rke, vendi
from ubgen.measures.splits import few_shot_subset

if TYPE_CHECKING:
    from ubgen.measures.probe import fit_linear_probe as fit_linear_probe

__all__ = [
    "Manifold",
    "background_gap",
    "context_score",
    "few_shot_subset",
    "fit_linear_probe",
    "frechet",
    "kid",
    "manifold",
    "rke",
    "shape_bias",
    "vendi",
]


def __getattr__(name: str) -> Any:
    """The probe brings PyTorch, for which `--help` need not wait."""
    if name != "fit_linear_probe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ubgen.measures.probe import fit_linear_probe

    return fit_linear_probe
