"""Speed and memory of what ubgen runs, against its peers, both sides in one process."""

from ubgen.benchmark.engine import EngineBench, bench_engine
from ubgen.benchmark.machine import machine_record, peak_memory
from ubgen.benchmark.pretrain import LoaderBench, bench_pretrain
from ubgen.benchmark.probe import ProbeBench, bench_probe
from ubgen.benchmark.synth import SynthBench, bench_synth
from ubgen.benchmark.table import Table
from ubgen.benchmark.timing import Timing, compare

__all__ = [
    "EngineBench",
    "LoaderBench",
    "ProbeBench",
    "SynthBench",
    "Table",
    "Timing",
    "bench_engine",
    "bench_pretrain",
    "bench_probe",
    "bench_synth",
    "compare",
    "machine_record",
    "peak_memory",
]
