"""One contract to run a compiled network, whatever compiled it."""

from ubgen.runtime.engine import EngineSet, load
from ubgen.runtime.network import Dim, Network, Signature, TensorSpec, run_rows

__all__ = ["Dim", "EngineSet", "Network", "Signature", "TensorSpec", "load", "run_rows"]
