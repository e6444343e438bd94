"""From trained weights to compiled engines that are proven equal to PyTorch."""

from ubgen.export.build import Exported, export_engine
from ubgen.export.parity import ParityRow
from ubgen.export.plan import Planned, machine_problem, plan_export
from ubgen.export.spec import EngineSpec, load_spec

__all__ = [
    "EngineSpec",
    "Exported",
    "ParityRow",
    "Planned",
    "export_engine",
    "load_spec",
    "machine_problem",
    "plan_export",
]
