"""From an engine and a class list to an annotated dataset."""

from ubgen.synth.config import SynthConfig
from ubgen.synth.synthesise import Progress, Synthesised, synthesise

__all__ = ["Progress", "SynthConfig", "Synthesised", "synthesise"]
