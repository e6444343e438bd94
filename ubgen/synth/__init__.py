"""From an engine and a class list to an annotated dataset."""

from ubgen.synth.audit import Audit, audit
from ubgen.synth.config import SynthConfig
from ubgen.synth.synthesise import Synthesised, synthesise

__all__ = ["Audit", "SynthConfig", "Synthesised", "audit", "synthesise"]
