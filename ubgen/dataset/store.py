"""Where a dataset lies: see `ubgen.storage`, which the stages' manifests use too."""

from ubgen.storage import Store, open_store

__all__ = ["Store", "open_store"]
