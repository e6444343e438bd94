"""From an engine and a class list to an annotated dataset.

`synthesise` and `audit` stand in modules of their names: options are read without torch.
"""

from ubgen.synth.config import SynthConfig

__all__ = ["SynthConfig"]
