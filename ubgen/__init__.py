"""ubgen: from a list of class names to a low-bias annotated image dataset."""

import os

from ubgen.core.classes import load_classes

# read by ONNX Runtime when it is loaded: without it, it writes files below the home directory and sends events
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["load_classes"]
__version__ = "0.1.0"
