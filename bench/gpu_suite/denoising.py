"""The part "denoise": one guided UNet call, and the whole loop, in every variant and batch.

FLOPs are those of diffusers' UNet on 2 rows an image: 2 for each multiply-add of matrix products, convolutions and
attention (both products of it), counted by torch's flop counter on shapes alone. Where a variant needs fewer for the
same result, "executed" has its own count.
"""

import time
from typing import Any

import numpy as np
import torch

from bench.gpu_suite.processes import result_of
from bench.gpu_suite.sizes import Sizes
from bench.gpu_suite.suite import Suite
from bench.gpu_suite.tuned import TunedUNet, Tuning
from bench.gpu_suite.variants import GUIDANCE, chosen, reference_noise
from bench.gpu_suite.workers import CHECKED, Failed, Worker
from ubgen.benchmark import Timing
from ubgen.export.flops import count_flops
from ubgen.export.networks import UNet

LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
PEERS = ("eager", "compile")


def begin(suite: Suite) -> list[Worker]:
    """Start and compile everything; needs no quiet machine. Returns the workers that are ready in time."""
    batches = suite.sizes.batches
    workers = [Worker(variant, suite.settings) for variant in chosen(suite.settings)]
    for worker in workers:
        worker.send("prepare", batches[:1] if worker.variant.headline else batches)
    ready = []
    for worker in workers:
        name = worker.variant.name
        try:
            suite.fact(**{f"{name}: seconds to prepare": round(worker.answer(suite.left()), 1)})
            ready.append(worker)
        except Failed as failure:
            suite.skip(name, f"while it was prepared: {failure}")
    return ready


def run(suite: Suite, workers: list[Worker]) -> None:
    """Rows: one for each variant and batch that was measured ("call"), and for the loops ("loop")."""
    try:
        _measure(suite, workers)
    finally:
        for worker in workers:
            worker.stop()


def _measure(suite: Suite, ready: list[Worker]) -> None:
    flops = {variant: executed_flops(suite.sizes, variant) for variant in {w.variant.tuning for w in ready}}
    nominal = executed_flops(suite.sizes, None)
    suite.fact(flops_per_image=nominal)
    reference = result_of(reference_noise, suite.settings, CHECKED)
    for batch in suite.sizes.batches:
        first = batch == suite.sizes.batches[0]
        bound = _bind(suite, [w for w in ready if first or not w.variant.headline], batch, reference)
        ready = [w for w in ready if w in bound or (w.variant.headline and not first)]
        for worker, timing in _turns(suite, list(bound), batch, suite.share(0.25)).items():
            seconds = timing.median / 1000
            suite.add(
                timing,
                kind="call",
                batch=batch,
                variant=worker.variant.name,
                about=worker.variant.about,
                dtype=worker.variant.dtype,
                ms=timing.median,
                q1=timing.q1,
                q3=timing.q3,
                rounds=timing.rounds,
                tflops=batch * nominal / seconds / 1e12,
                executed_tflops=batch * flops[worker.variant.tuning] / seconds / 1e12,
                **bound[worker],
            )
        _loops(suite, list(bound), batch)


def _bind(
    suite: Suite, workers: list[Worker], batch: int, reference: np.ndarray
) -> dict[Worker, dict[str, Any]]:
    """Workers whose output is right, with its error and their memory."""
    bound = {}
    for worker in workers:
        name = f"{worker.variant.name}, batch {batch}"
        try:
            result = worker.ask(min(60, suite.left()), "bind", batch)
        except Failed as failure:
            suite.skip(name, str(failure))
            continue
        wanted = reference[: len(result["noise"])]
        error = float(np.linalg.norm(result["noise"] - wanted) / np.linalg.norm(wanted))
        if not error <= LARGEST_ERROR[worker.variant.dtype]:
            suite.skip(name, f"its output is wrong: relative error {error:.1e}")
            worker.stop()
            continue
        bound[worker] = {"error": error, "peak_gb": result["peak"] / 1e9}
    return bound


def _turns(suite: Suite, workers: list[Worker], batch: int, seconds: float) -> dict[Worker, Timing]:
    """The workers take turns for about `seconds`, 3 rounds at least."""
    order, times = list(workers), {worker: list[float]() for worker in workers}
    end, rounds = time.monotonic() + seconds, 0
    while order and (rounds < 3 or (time.monotonic() < end and rounds < 50)):
        for worker in list(order):
            try:
                times[worker].append(worker.ask(min(60, suite.left()), "turn"))
            except Failed as failure:
                suite.skip(f"{worker.variant.name}, batch {batch}", f"while it was measured: {failure}")
                order.remove(worker)
        order, rounds = order[1:] + order[:1], rounds + 1
    return {worker: Timing.of(times[worker]) for worker in workers if worker in order}


def _loops(suite: Suite, workers: list[Worker], batch: int) -> None:
    """The whole loop of the peers and of the fastest other variants, once or twice."""
    rows = {
        r["variant"]: r["ms"] for r in suite.content["rows"] if r["kind"] == "call" and r["batch"] == batch
    }
    others = sorted((ms, name) for name, ms in rows.items() if name not in PEERS)
    names = [*PEERS, *(name for _, name in others[:2])]
    picked = [worker for worker in workers if worker.variant.name in names and worker.variant.name in rows]
    expected = sum(rows[worker.variant.name] for worker in picked) * (suite.sizes.steps + 1) / 1000
    for repeat in range(2):
        if expected > suite.left() / (2 + 4 * repeat):
            if not repeat:
                suite.skip(
                    f"loops, batch {batch}", f"about {expected:.0f} s, and {suite.left():.0f} s are left"
                )
            return
        for worker in picked:
            with suite.guard(f"{worker.variant.name}, loop, batch {batch}"):
                ms = worker.ask(min(120, suite.left()), "loop")
                suite.add(
                    kind="loop", batch=batch, variant=worker.variant.name, ms=ms, steps=suite.sizes.steps
                )


def executed_flops(sizes: Sizes, tuning: Tuning | None) -> int:
    """Of one guided call for one image."""
    from diffusers import UNet2DConditionModel

    channels, height, width = sizes.latent
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes.unet).eval().requires_grad_(False)
        inputs = {"latents": torch.empty(1, channels, height, width), "timestep": torch.empty(1)}
        cond = torch.empty(1, sizes.tokens, sizes.width)
        if tuning is None:
            prompts = {"cond": cond, "uncond": cond, "guidance": torch.empty(1)}
            return count_flops(UNet(unet), inputs | prompts)[""]
        plain = Tuning(tuning.shared_start, tuning.phases)
        tuned = TunedUNet(unet, plain, GUIDANCE)
        tuned.set_prompts(cond, cond)
    return count_flops(tuned, inputs)[""]
