"""ubgen: from a list of class names to a low-bias annotated image dataset."""

__version__ = "0.1.0"
