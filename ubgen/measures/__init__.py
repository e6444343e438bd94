"""Plain functions on features and predictions: what is computed, apart from where the arrays come from."""

from ubgen.measures.splits import few_shot_subset

__all__ = ["few_shot_subset"]
