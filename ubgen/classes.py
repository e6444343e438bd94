"""Class lists; see `ubgen.core.classes`."""

from ubgen.core.classes import ClassList, load_classes

__all__ = ["ClassList", "load_classes"]
