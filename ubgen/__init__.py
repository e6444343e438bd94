"""ubgen: from a list of class names to a low-bias annotated image dataset."""

from ubgen.core.classes import load_classes

__all__ = ["load_classes"]
__version__ = "0.1.0"
