"""What synthesis itself costs, with networks that do nothing.

    python bench/synthesis_scale.py [--work DIR] [--out DIR] [--samples N]

Every run is a process of its own: 13,000 samples, 1,300,000 samples of 1,000 classes in shards of 1,000, the same again
with all shards finished (a resume that has nothing to make), and again with one shard missing. Each sample is a 256x256
JPEG that is encoded and written. Beside it the limit: the same image encoded in as many threads, and nothing else.
Writes synthesis-scale.json and .md. Needs about 30 GB of disk and a quarter of an hour; `--samples 26000` for a trial.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.stage import read_manifest
from ubgen.dataset import encode_image
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Scored
from ubgen.synth.plan import Item
from ubgen.synth.synthesise import synthesise

# ubgen.benchmark is imported by the functions that need it: with all its peers it is 170 MB larger than synthesis
CLASSES, SHARD, FEW = 1000, 1000, 13_000
GOALS = {"start, s": 10, "resume, s": 10, "peak memory, MB": 600, "cost against few": 1.1, "samples/s": 3000}


class Nothing:
    """A fixed picture for every sample, so that it can be encoded and written but costs nothing to make."""

    concurrency = 1

    def __init__(self, batch: int = 64, side: int = 256) -> None:
        self.batch = batch
        self._picture = _picture(side)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def denoise(self, items: Sequence[Item]) -> Tensor:
        return torch.zeros(len(items), 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self._picture.expand(len(latents), -1, -1, -1)

    def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored:
        ones = torch.ones(len(items))
        return Scored(
            pixels, 0.3 * ones, 4.0 * ones, ones.bool(), ~ones.bool(), ones[:, None].expand(-1, 768)
        )


def _picture(side: int) -> Tensor:
    """(1,side,side,3) uint8: smooth shapes and a little grain, about as large as a photo of the same size in JPEG."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = torch.stack(
        [torch.sin(9 * x + 5 * y), torch.cos(7 * y * x), torch.sin(20 * (x - y) ** 2)], dim=-1
    )
    grain = torch.randn(side, side, 1, generator=torch.Generator().manual_seed(0))
    return (128 + 80 * waves + 4 * grain).clamp(0, 255).to(torch.uint8).unsqueeze(0)


def run(out: str, engine: str, samples: int) -> dict[str, Any]:
    """One run of the stage in this process: seconds until the first sample and in all, memory, samples per second."""
    start = time.perf_counter()
    first: list[float] = []

    def progress(done: int, total: int, note: str = "") -> None:
        if len(first) < 2:
            first.append(time.perf_counter() - start)  # once when the plan is known, once at the first batch

    config = SynthConfig(Path(engine), "imagenet1k", samples // CLASSES, out, shard_size=SHARD)
    result = synthesise(config, progress, open_source=lambda *_: Nothing())
    seconds = time.perf_counter() - start
    speed = read_manifest(out, "synth")["speed"]
    return {
        "samples": samples,
        "made": result.made,
        "until_plan": first[0],
        "until_first": first[-1],
        "making": speed["worker_seconds"],
        "seconds": seconds,
        "peak": peak(),
        "rate": result.made / speed["worker_seconds"] if result.made else None,
        "busy": speed["busy_seconds"],
        "bottleneck": speed["bottleneck_shares"],
    }


def peak() -> int:
    """Bytes of resident memory at most; getrusage would also count the parent's, from before this program began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def encoder(samples: int) -> float:
    """Images a second of the encoder alone, on all cores."""
    picture = Nothing().decode(Nothing().denoise([Item(0, 0, 0)]))[0].numpy()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        start = time.perf_counter()
        for _ in range(0, samples, 256):
            list(pool.map(lambda _: encode_image(picture, "jpg"), range(256)))
        return (samples // 256 * 256) / (time.perf_counter() - start)


def isolated(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(work: Path, samples: int) -> dict[str, Any]:
    from ubgen.benchmark import machine_record

    engine = work / "engine"
    engine.mkdir(parents=True, exist_ok=True)
    about = {"stage": "export", "engine": {"key": "sha256:nothing"}, "inputs": {}}
    (engine / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    result: dict[str, Any] = {"machine": machine_record(), "encoder": isolated(encoder, 8192)}
    result["few"] = isolated(run, str(work / "few"), str(engine), FEW)
    print(f"{FEW}: {result['few']['rate']:.0f}/s", flush=True)
    many = work / "many"
    result["many"] = isolated(run, str(many), str(engine), samples)
    print(f"{samples}: {result['many']['rate']:.0f}/s", flush=True)
    result["disk"] = sum(p.stat().st_size for p in many.iterdir() if p.is_file())
    (many / "manifest.json").unlink()
    result["nothing left"] = isolated(run, str(many), str(engine), samples)
    (many / "manifest.json").unlink()
    (many / "shard-000007.json").unlink()
    result["one shard left"] = isolated(run, str(many), str(engine), samples)
    result["encoder after"] = isolated(encoder, 8192)
    return result


def tables(result: dict[str, Any]) -> list[Any]:
    from ubgen.benchmark import Table
    from ubgen.benchmark.table import number

    runs = Table(
        "Runs",
        (
            "run",
            "samples",
            "made",
            "s until the plan",
            "s until the first batch",
            "samples/s",
            "peak MB",
            "s in all",
        ),
        text_columns=1,
    )
    for name in ("few", "many", "nothing left", "one shard left"):
        row = result[name]
        cells = (row["until_plan"], row["until_first"], row["rate"], row["peak"] / 1e6, row["seconds"])
        runs.rows.append((name, f"{row['samples']:,}", f"{row['made']:,}", *map(number, cells)))
    runs.note = "In all: with figures, ledger, pictures, card and Croissant description at the end."
    few, many = result["few"], result["many"]
    limit = min(result["encoder"], result["encoder after"])
    found = {
        "start, s": many["until_first"],
        "resume, s": result["one shard left"]["until_first"],
        "peak memory, MB": many["peak"] / 1e6,
        "cost against few": few["rate"] / many["rate"],
        "samples/s": many["rate"],
    }
    goals = Table("Goals", ("what", "found", "goal"), text_columns=1)
    for name, value in found.items():
        low = name == "samples/s"
        bound = f"at least {number(min(GOALS[name], limit))}" if low else f"at most {GOALS[name]}"
        goals.rows.append((name, number(value), bound))
    goals.note = (
        f"The encoder alone, in as many threads as cores: {number(result['encoder'])}/s before, "
        f"{number(result['encoder after'])}/s after the runs. The dataset takes {result['disk'] / 1e9:.1f} GB."
    )
    return [runs, goals]


def main() -> None:
    from ubgen.benchmark.machine import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="where the datasets are written (default: thrown away)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--samples", type=int, default=1_300_000)
    given = parser.parse_args()
    if given.work:
        Path(given.work).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="ubgen-scale-", dir=given.work))
    try:
        result = measure(work, given.samples)
    finally:
        shutil.rmtree(work)
    text = "# What synthesis itself costs\n\n`python bench/synthesis_scale.py`: the networks do nothing.\n\n"
    text += "\n".join(table.markdown() for table in tables(result)) + f"\n{describe(result['machine'])}.\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "synthesis-scale.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (given.out / "synthesis-scale.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
