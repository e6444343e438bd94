"""Plain functions on features and predictions: what is computed, apart from where the arrays come from."""
