"""One call of an SD1.5-size UNet on the CPU: eager PyTorch against ONNX Runtime and AOTInductor.

    python bench/unet_cpu.py [--small] [--work DIR] [--out DIR]

Every comparison is one process in which the sides take turns; every figure of memory comes from a process of its own.
Random weights, all tensors distinct; one image, which guidance makes two rows. Prints tables and writes them to OUT as
unet-cpu.json and unet-cpu.md. Graphs and packages are kept in WORK and used again by a later run; the full size takes
about half an hour and 14 GB of memory, `--small` some seconds and no AOTInductor. `ubgen-bench engine` and `ubgen-bench
synth` measure the miniature's whole loop.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.benchmark import Table, compare, machine_record, peak_memory
from ubgen.benchmark.machine import describe, resident
from ubgen.export.exportable import Exportable
from ubgen.export.networks import UNet
from ubgen.export.spec import BatchRange, NetworkSpec, Options
from ubgen.runtime import Network, Signature
from ubgen.runtime.backends import backend

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
BATCH = BatchRange(1, 1, 4)
GIB = 2**30
PROMPT = 77

# the sides beside eager PyTorch: how each graph or package is made
PLAIN = {"ort opset 20, plain": 20, "ort opset 23, plain": 23}
STEPS = {
    "ort 23 + attention": ("attention",),
    "ort 23 + attention, group norm": ("attention", "norm"),
}
ENGINE = "onnxruntime"  # as ubgen-export makes it: both, and equal rows once
PACKAGES = {"aotinductor, not frozen": False, "aotinductor": True}


def unet(config: Mapping[str, Any]) -> UNet:
    """Random, in eval mode; norms and biases are drawn too, since equal tensors would be stored once."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(in_channels=4, out_channels=4, **config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return UNet(model).eval()


def inputs(config: Mapping[str, Any], images: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size, width = config["sample_size"], config["cross_attention_dim"]
    return {
        "latents": torch.randn(images, 4, size, size, generator=generator),
        "timestep": torch.full((images,), 501.0),
        "cond": torch.randn(images, PROMPT, width, generator=generator),
        "uncond": torch.randn(1, PROMPT, width, generator=generator),
        "guidance": torch.tensor([2.0]),
    }


class Bench:
    """Where things are kept, and how large the network is. Its methods run in processes of their own."""

    def __init__(self, work: Path, small: bool, rounds: int) -> None:
        self.work, self.small, self.rounds = work, small, rounds
        self.config = SMALL if small else SD15

    def export(self, side: str) -> dict[str, Any]:
        """Make the file of one side: the plain graphs as PyTorch exports them, all else as `ubgen-export` does."""
        if side in STEPS:
            return _apply(STEPS[side], self.file("ort opset 23, plain"), self.file(side))
        from ubgen.export.compilers import compile_network
        from ubgen.export.compilers.onnx import export_onnx

        shared = frozenset({"uncond", "guidance"})
        network = Exportable(unet(self.config), [inputs(self.config, 2)], "noise", shared)
        spec, start = self.spec(side), time.perf_counter()
        if side in PLAIN:
            export_onnx(network, spec, self.file(side), rewrite=False)
        else:
            compile_network(network, spec, self.work / _stem(side), "cpu", lambda line: None)
        signature = network.signature(BATCH)
        (self.work / "signature.json").write_text(json.dumps(signature.to_dict()), encoding="utf-8")
        return {"seconds": time.perf_counter() - start}

    def spec(self, side: str) -> NetworkSpec:
        if side in PACKAGES:
            options = Options(freeze=PACKAGES[side], max_autotune=False)
            return NetworkSpec(BATCH, 1e-4, compiler="aotinductor", options=options)
        return NetworkSpec(BATCH, 1e-4, opset=PLAIN.get(side, 23))

    def file(self, side: str) -> Path:
        return self.work / f"{_stem(side)}.{'pt2' if side in PACKAGES else 'onnx'}"

    def open(self, side: str) -> Network:
        signature = Signature.from_dict(json.loads((self.work / "signature.json").read_text("utf-8")))
        name, threads = self.spec(side).compiler, torch.get_num_threads()
        return backend(name).load("unet", self.file(side), signature, "cpu", threads, {})

    @torch.no_grad()
    def speed(self, side: str) -> dict[str, Any]:
        """Eager PyTorch and one side, in turns."""
        given, eager, network = inputs(self.config), unet(self.config), self.open(side)
        reference, ours = eager(**given), network.run(given)["noise"]
        error = float((ours - reference).abs().max() / reference.abs().max())
        sides: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(**given),
            "side": lambda: network.run(given),
        }
        times = compare(sides, seconds=0.0, least=self.rounds)
        return {name: asdict(timing) for name, timing in times.items()} | {"error": error}

    @torch.no_grad()
    def memory(self, side: str) -> dict[str, Any]:
        """Bytes that a process holds at most while it runs the network, beyond what the libraries take."""
        given, weights = inputs(self.config), 0
        _import_all()
        with peak_memory() as load:
            if side == "eager":
                module = unet(self.config)
                weights = sum(p.numel() * p.element_size() for p in module.parameters())
                call: Callable[[], object] = lambda: module(**given)  # noqa: E731
            else:
                network = self.open(side)
                call = lambda: network.run(given)  # noqa: E731
        with peak_memory() as run:
            for _ in range(3):
                call()
        return {"weights": weights, "load": load.extra, "run": run.peak - load.held, "activations": run.extra}


def _apply(names: tuple[str, ...], source: Path, target: Path) -> dict[str, Any]:
    """Some of the passes alone on a plain graph; the weights stay where they are."""
    import onnx_ir
    from onnxscript.rewriter import rewrite

    from ubgen.export.compilers.onnx_passes import FuseAttention, LowerGroupNorm

    rules: dict[str, Any] = {"attention": FuseAttention, "norm": LowerGroupNorm}
    model = onnx_ir.load(source)
    rewrite(model, pattern_rewrite_rules=[rules[name].rule() for name in names])
    onnx_ir.save(model, target)
    return {"seconds": 0.0}


def isolated(threads: int, method: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a call in a new process, and that process's largest resident memory, "peak"."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        result = pool.submit(method, *arguments).result()
        return result | {"peak": pool.submit(resident).result()}


def measure(bench: Bench, threads: int, with_aotinductor: bool) -> dict[str, Any]:
    """Every figure; progress goes to stderr."""
    sides = ["ort opset 23, plain", ENGINE] if bench.small else [*PLAIN, *STEPS, ENGINE]
    sides += PACKAGES if with_aotinductor else ()
    result: dict[str, Any] = {"built": {}, "speed": {}, "memory": {}}
    for side in sides:
        say(f"making {side}")
        result["built"][side] = _once(bench, threads, side)
    for side in sides:
        say(f"timing {side}")
        result["speed"][side] = isolated(threads, bench.speed, side)
    for side in ("eager", ENGINE, *(["aotinductor"] if with_aotinductor else [])):
        say(f"memory of {side}")
        result["memory"][side] = isolated(threads, bench.memory, side)
    return result


def _once(bench: Bench, threads: int, side: str) -> dict[str, Any]:
    """What making it took, from the earlier run that left it in WORK where there was one."""
    record = bench.work / f"{_stem(side)}.json"
    if not (record.exists() and bench.file(side).exists()):
        record.write_text(json.dumps(isolated(threads, bench.export, side)), encoding="utf-8")
    return json.loads(record.read_text("utf-8"))


def speed_table(result: dict[str, Any]) -> Table:
    table = Table(
        "One call of the UNet",
        ("side", "eager, s", "side, s", "times as fast", "by CPU time", "error", "made in, s", "with, GiB"),
        text_columns=1,
    )
    for name, row in result["speed"].items():
        eager, side, built = row["eager"], row["side"], result["built"][name]
        made = (f"{built['seconds']:.0f}", f"{built['peak'] / GIB:.1f}") if built["seconds"] else ("", "")
        seconds = (f"{eager['median'] / 1000:.3g}", f"{side['median'] / 1000:.3g}")
        faster = (f"{eager[clock] / side[clock]:.2f}" for clock in ("median", "cpu"))
        table.rows.append((name, *seconds, *faster, f"{row['error']:.1e}", *made))
    return table


def memory_table(result: dict[str, Any]) -> Table:
    table = Table(
        "Memory beside the libraries', GiB",
        ("side", "weights", "most while loading", "most while running", "of eager's"),
        text_columns=1,
    )
    eager = result["memory"]["eager"]
    needed = eager["weights"] + eager["activations"]
    for side, row in result["memory"].items():
        cells = (f"{row[key] / GIB:.2f}" for key in ("weights", "load", "run"))
        ratio = needed if side == "eager" else row["run"]
        table.rows.append((side, *cells, f"{ratio / needed:.2f}"))
    table.note = "The last column: against eager's weights and activations."
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that all of it works")
    parser.add_argument("--work", type=Path, help="where graphs and packages are kept (default: thrown away)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-aotinductor", action="store_true", help="it takes a C++ compiler and minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ubgen-unet-cpu-") as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work.resolve(), given.small, given.rounds)
        result = measure(bench, given.threads, not (given.small or given.no_aotinductor))
    torch.set_num_threads(given.threads)
    write(result | {"machine": machine_record(), "rounds": given.rounds}, given.out)


def write(result: dict[str, Any], out: Path) -> None:
    """unet-cpu.json and unet-cpu.md into the directory `out`, and the latter to stdout."""
    text = f"# UNet on the CPU\n\n{speed_table(result).markdown()}\n{memory_table(result).markdown()}"
    text += f"\n{describe(result['machine'])}. Medians of {result['rounds']} calls; the sides take turns in a process."
    out.mkdir(parents=True, exist_ok=True)
    (out / "unet-cpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "unet-cpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stem(side: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in side)


def _import_all() -> None:
    """What either side imports, so that libraries do not count as the network's memory."""
    import diffusers.models.unets.unet_2d_condition  # noqa: F401
    import onnxruntime  # noqa: F401


if __name__ == "__main__":
    main()
