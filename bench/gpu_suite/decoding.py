"""The part "decode": latents to 8-bit images."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_suite.checking import wait_for_build
from bench.gpu_suite.networks import random_vae
from bench.gpu_suite.suite import Suite
from bench.gpu_suite.tuned import native_norms, phase_upsamplers
from ubgen.benchmark import compare, peak_memory
from ubgen.export.flops import count_flops
from ubgen.export.networks import VaeDecoder

Decode = Callable[[Tensor], Tensor]
LARGEST_ERROR = 0.05  # share of values that are off by more than 2 grey levels


def begin(suite: Suite) -> dict[str, Decode]:
    """Every way, compiled for every batch."""
    dtype = torch.float32 if suite.small else torch.bfloat16
    vae, sides = random_vae(suite.sizes.vae, suite.device, dtype), dict[str, Decode]()
    for name, build in _ways(suite).items():
        with suite.guard(name):
            call = build(copy.deepcopy(vae))
            for batch in suite.sizes.scored:
                call(_latents(suite, batch))
            sides[name] = call
    return sides


@torch.no_grad()
def run(suite: Suite, sides: dict[str, Decode]) -> None:
    flops = count_flops(VaeDecoder(random_vae(suite.sizes.vae, "meta")), {"latents": _latents(suite, 1)})[""]
    suite.fact(flops_per_image=flops)
    for batch in suite.sizes.scored:
        latents, good, peaks = _latents(suite, batch), {}, {}
        for name, call in sides.items():
            with suite.guard(f"{name}, batch {batch}"):
                with peak_memory(suite.device) as peak:
                    pixels = call(latents)
                difference = (pixels.int() - sides["eager"](latents).int()).abs()
                share = float((difference > 2).float().mean())
                if share > LARGEST_ERROR:
                    raise ValueError(f"its images are wrong: {share:.1%} of the values")
                good[name], peaks[name] = partial(call, latents), peak.peak / 1e9
        for name, timing in compare(good, suite.device, seconds=suite.share(0.25), least=3).items():
            suite.add(
                timing,
                network="VAE decoder",
                variant=name,
                batch=batch,
                ms=timing.median,
                q1=timing.q1,
                q3=timing.q3,
                rounds=timing.rounds,
                tflops=batch * flops / timing.median / 1e9,
                peak_gb=peaks[name],
            )


def _ways(suite: Suite) -> dict[str, Callable[[Any], Decode]]:
    """From a VAE of its own; "eager" is diffusers' with `ubgen`'s ending in 8 bits."""
    options: dict[str, Any] = {"backend": "aot_eager"} if suite.small else {}

    def channels_last(vae: Any) -> Any:
        return vae.to(memory_format=torch.channels_last)

    def tuned(vae: Any, native: bool) -> Any:
        phase_upsamplers(vae.decoder)
        if native:
            wait_for_build(suite.settings)
            native_norms(vae.decoder)
        return channels_last(vae)

    def compiled(vae: Any) -> Decode:
        return torch.compile(_decoder(channels_last(vae)))

    return {
        "eager": _decoder,
        "channels-last": lambda vae: _decoder(channels_last(vae)),
        **({} if suite.small else {"compile": compiled}),
        "phases, compile": lambda vae: torch.compile(_decoder(tuned(vae, False)), **options),
        "phases, native norms": lambda vae: _decoder(tuned(vae, True)),  # last: it waits for the build
    }


def _decoder(vae: Any) -> Decode:
    decoder, dtype = VaeDecoder(vae), vae.dtype

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return decoder(latents.to(dtype))

    return decode


def _latents(suite: Suite, batch: int) -> Tensor:
    generator = torch.Generator(suite.device).manual_seed(6)
    return torch.randn((batch, *suite.sizes.latent), device=suite.device, generator=generator)
