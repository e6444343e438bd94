"""The part "score": 8-bit images to CLIP features and to Q-Align scores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_suite.networks import qalign_bytes, random_clip, random_qalign
from bench.gpu_suite.suite import Suite
from ubgen.benchmark import compare, peak_memory
from ubgen.export.flops import count_flops
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.rewards import QAlign

Score = Callable[[Tensor], Tensor]
NEEDED = 1.25  # times the weights, for a network and its activations
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def begin(suite: Suite) -> dict[str, Score]:
    """CLIP's image tower, compiled for every batch."""
    sides = dict[str, Score]()
    with suite.guard("CLIP"):
        clip = random_clip(suite.sizes.clip, suite.device, _dtype(suite))
        suite.fact(clip_flops_per_image=_clip_flops(suite))

        @torch.no_grad()
        def features(pixels: Tensor) -> Tensor:
            return torch.nn.functional.normalize(clip.encode_image(_images(pixels)).float(), dim=-1)

        sides["eager"] = features
        with suite.guard("CLIP, compile"):
            options: dict[str, Any] = {"backend": "aot_eager"} if suite.small else {}
            compiled: Score = torch.compile(features, **options)
            for batch in suite.sizes.scored:
                compiled(_pixels(suite, batch))
            sides["compile"] = compiled
    return sides


@torch.no_grad()
def run(suite: Suite, clip: dict[str, Score]) -> None:
    if clip:
        flops = suite.content["facts"]["clip_flops_per_image"]
        for batch in suite.sizes.scored:
            with suite.guard(f"CLIP, batch {batch}"):
                _compare(suite, "CLIP ViT-L/14", clip, batch, dict.fromkeys(clip, flops), suite.share(0.125))
    clip.clear()
    with suite.guard("Q-Align"):
        _score_quality(suite)


def _score_quality(suite: Suite) -> None:
    needed, free = NEEDED * qalign_bytes(suite.sizes.qalign), _free_memory(suite)
    if needed > free:
        suite.skip("Q-Align", f"needs about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
        return
    qalign = random_qalign(suite.sizes.qalign, suite.device, _dtype(suite))
    scorer = QAlignScorer(qalign)
    whole, folded = _qalign_flops(suite)
    suite.fact(qalign_flops_per_image=whole, qalign_folded_flops_per_image=folded)
    for batch in suite.sizes.scored:
        sides: dict[str, Score] = {"eager": lambda pixels: qalign.score(_images(pixels)), "folded": scorer}
        flops = {"eager": whole, "folded": folded, "folded, CUDA graph": folded}
        if suite.device != "cpu":
            with suite.guard(f"Q-Align, CUDA graph, batch {batch}"):
                sides["folded, CUDA graph"] = _graphed(scorer, _pixels(suite, batch))
        with suite.guard(f"Q-Align, batch {batch}"):
            _compare(suite, "Q-Align 7B", sides, batch, flops, suite.share(0.25))


def _compare(
    suite: Suite, network: str, sides: dict[str, Score], batch: int, flops: dict[str, int], seconds: float
) -> None:
    """One row for each side whose output is that of "eager"."""
    pixels, good, peaks = _pixels(suite, batch), {}, {}
    for name, call in sides.items():
        with suite.guard(f"{network}, {name}, batch {batch}"):
            with peak_memory(suite.device) as peak:
                output = call(pixels)
            wanted = sides["eager"](pixels).float()
            error = float((output.float() - wanted).norm() / wanted.norm())
            if not error <= LARGEST_ERROR[_dtype(suite)]:
                raise ValueError(f"its output is wrong: relative error {error:.1e}")
            good[name], peaks[name] = partial(call, pixels), peak.peak / 1e9
    for name, timing in compare(good, suite.device, seconds=seconds, least=3).items():
        suite.add(
            timing,
            network=network if not suite.small else network.split()[0],
            variant=name,
            batch=batch,
            ms=timing.median,
            q1=timing.q1,
            q3=timing.q3,
            rounds=timing.rounds,
            tflops=batch * flops[name] / timing.median / 1e9,
            peak_gb=peaks[name],
        )


def _graphed(scorer: QAlignScorer, pixels: Tensor) -> Score:
    from ubgen.runtime.cuda_graphs import TorchGraph

    graph = TorchGraph(lambda inputs: {"score": scorer(inputs["pixels"])}, {"pixels": pixels})
    return lambda given: graph({"pixels": given})["score"]


def _clip_flops(suite: Suite) -> int:
    clip = random_clip(suite.sizes.clip, "meta", torch.float32)
    side = clip.image_size
    visual: torch.nn.Module = clip.model.visual  # type: ignore[assignment]
    return count_flops(visual, {"x": torch.empty(1, 3, side, side, device="meta")})[""]


def _qalign_flops(suite: Suite) -> tuple[int, int]:
    """Of one image: the whole prompt, and with what is folded left out; the five level rows of the head in both."""
    side = suite.sizes.image
    pixels = {"pixels": torch.empty(1, side, side, 3, dtype=torch.uint8, device="meta")}
    with torch.device("meta"):
        qalign = QAlign(suite.sizes.qalign).to("meta").requires_grad_(False)
        size = qalign.image_size
        whole = count_flops(qalign, {"pixel_values": torch.empty(1, 3, size, size)})[""]
        return whole, count_flops(QAlignScorer(qalign), pixels)[""]


def _free_memory(suite: Suite) -> int:
    if suite.device == "cpu":
        import os

        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(suite.device)[0]


def _dtype(suite: Suite) -> torch.dtype:
    return torch.float32 if suite.small else torch.float16


def _images(pixels_BHW3: Tensor) -> Tensor:
    return pixels_BHW3.permute(0, 3, 1, 2).float() / 255


def _pixels(suite: Suite, batch: int) -> Tensor:
    generator = torch.Generator(suite.device).manual_seed(7)
    shape = (batch, suite.sizes.image, suite.sizes.image, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=suite.device, generator=generator)
