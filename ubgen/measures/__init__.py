"""Plain functions on features and predictions: what is computed, apart from where the arrays come from."""

from ubgen.measures.distance import Manifold, frechet, kid, manifold
from ubgen.measures.diversity import rke, vendi
from ubgen.measures.splits import few_shot_subset

__all__ = ["Manifold", "few_shot_subset", "frechet", "kid", "manifold", "rke", "vendi"]
