"""Plain functions on features and predictions: what is computed, apart from where the arrays come from."""

from ubgen.measures.bias import background_gap, context_score, shape_bias
from ubgen.measures.distance import Manifold, frechet, kid, manifold
from ubgen.measures.diversity import rke, vendi
from ubgen.measures.splits import few_shot_subset

__all__ = [
    "Manifold",
    "background_gap",
    "context_score",
    "few_shot_subset",
    "frechet",
    "kid",
    "manifold",
    "rke",
    "shape_bias",
    "vendi",
]
