"""Real inputs for the comparison with PyTorch: prompts, denoising trajectories, final latents, decoded images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ubgen.core.classes import load_classes
from ubgen.core.errors import UserError
from ubgen.diffusion import StableDiffusion, initial_noise, sample, tokenize, with_sampler
from ubgen.export.exportable import Exportable, Say
from ubgen.export.networks import TextEncoder, VaeDecoder, vae_scale
from ubgen.export.spec import EngineSpec
from ubgen.runtime.network import exact_float32

CHUNK = 4  # rows that PyTorch runs at a time: enough to be fast, and small beside the weights


@dataclass(frozen=True)
class RealInputs:
    """On the CPU. `unet_calls`: the UNet's inputs at the first two, the middle and the last call of all images.

    `noise` (N,C,h,w) is what the images started from, `pixels` (N,H,W,3) uint8 what PyTorch made of it. `input_ids`
    has one row more than there are images, the unconditional prompt.
    """

    names: list[str]
    input_ids: Tensor
    noise: Tensor
    unet_calls: list[dict[str, Tensor]]
    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def real_inputs(sd: StableDiffusion, spec: EngineSpec) -> RealInputs:
    """Sample `spec.parity.images` images with PyTorch in float32 and keep what each network saw on the way."""
    settings = spec.parity
    classes = load_classes(settings.classes)
    # spread over the list where it is longer than the images, and round and round where it is shorter
    stride = max(1, len(classes) // settings.images)
    labels = [i * stride % len(classes) for i in range(settings.images)]
    names = [classes.names[label] for label in labels]
    ids = tokenize(sd, [*names, ""])
    side = spec.image_size // vae_scale(sd.vae.config)
    shape = (sd.unet.config.in_channels, side, side)
    noise = torch.stack(
        [initial_noise(settings.seed, c, i // len(classes), shape) for i, c in enumerate(labels)]
    )
    with exact_float32():
        embeddings = run_module(TextEncoder(sd.text_encoder), {"input_ids": ids}, spec.device)
        with on_device(sd.unet, spec.device):
            parts = [
                _trajectory(sd, spec, some_noise, cond, embeddings[-1:])
                for some_noise, cond in zip(noise.split(CHUNK), embeddings[:-1].split(CHUNK), strict=True)
            ]
        latents = torch.cat([part[0] for part in parts])
        pixels = run_module(VaeDecoder(sd.vae), {"latents": latents}, spec.device)
    calls = [_join(same) for same in zip(*(part[1] for part in parts), strict=True)]
    return RealInputs(names, ids, noise, calls, latents, pixels)


def _trajectory(
    sd: StableDiffusion, spec: EngineSpec, noise: Tensor, cond: Tensor, uncond: Tensor
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Final latents of some images, and the UNet's inputs at the kept calls, all on the CPU."""
    calls, guidance, rows = [], torch.tensor([spec.parity.guidance], dtype=torch.float32), len(noise)

    def recording_unet(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        seen = {"latents": latents[:rows], "timestep": timestep[:rows].float(), "cond": cond}
        calls.append(
            {name: tensor.cpu() for name, tensor in seen.items()} | {"uncond": uncond, "guidance": guidance}
        )
        return sd.unet(latents, timestep, context, return_dict=False)[0]

    latents = sample(
        recording_unet,
        with_sampler(sd.scheduler, "pndm"),
        noise.to(spec.device),
        cond.to(spec.device),
        uncond.to(spec.device),
        steps=spec.parity.steps,
        guidance=spec.parity.guidance,
    )
    kept = sorted({0, 1, len(calls) // 2, len(calls) - 1})
    return latents.cpu(), [calls[i] for i in kept]


def _join(parts: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    shared = ("uncond", "guidance")
    return {n: t if n in shared else torch.cat([part[n] for part in parts]) for n, t in parts[0].items()}


@torch.no_grad()
def run_module(module: torch.nn.Module, inputs: Mapping[str, Tensor], device: str) -> Tensor:
    """The output of `module` on `device` for any number of rows, on the CPU; `module` ends where it was."""
    return outputs(Exportable(module.eval(), [inputs], ""), device)[0]


def expected_outputs(name: str, network: Exportable, device: str, say: Say) -> list[Tensor]:
    """`outputs` of a network in float32: from the CPU, as exact and slower, where `device` has too little memory.

    UserError when PyTorch's own output cannot be right: with NaN or infinity, or the same whatever the input.
    """
    try:
        results = outputs(network, device)
    except torch.OutOfMemoryError:
        say(f"{name}: does not fit {device} in float32; running PyTorch on the CPU")
        results = []
    if not results:
        torch.cuda.empty_cache()  # of what the error still held
        results = outputs(network, "cpu")
    require_informative(name, network, results)
    return results


def require_informative(name: str, network: Exportable, results: Sequence[Tensor]) -> None:
    """UserError unless a comparison with these outputs can fail: two wrong sides may be equal."""
    rows = torch.cat(list(results))
    advice = "the weights cannot be right, or do not belong to their config"
    if not rows.isfinite().all():
        raise UserError(f"{name}: PyTorch's own output holds NaN or infinity on real inputs; {advice}")
    given = [t for inputs in network.inputs for n, t in inputs.items() if n not in network.constant]
    varied = any(bool((tensor != tensor[:1]).any()) for tensor in given)
    if varied and bool((rows == rows[:1]).all()):
        raise UserError(
            f"{name}: PyTorch's own output is the same for all of {len(rows)} real inputs; {advice}"
        )
    flat = rows.reshape(len(rows), -1)
    if flat.shape[1] > 1 and bool((flat == flat[:, :1]).all()):
        raise UserError(f"{name}: PyTorch's own output is one value throughout on real inputs; {advice}")


@torch.no_grad()
def outputs(network: Exportable, device: str) -> list[Tensor]:
    """The network's output for each of its real inputs, computed on `device` a few rows at a time, on the CPU."""
    results = []
    with on_device(network.module, device):
        for inputs in network.inputs:
            parts = []
            for start in range(0, network.count(inputs), CHUNK):
                rows = network.rows(inputs, start, start + CHUNK)
                parts.append(network.reference({n: t.to(device) for n, t in rows.items()}).cpu())
            results.append(torch.cat(parts))
    return results


@contextmanager
def on_device(module: torch.nn.Module, device: str) -> Iterator[None]:
    """The weights on `device`, and back on the CPU afterwards: no GPU holds them while a compiler works."""
    try:
        module.to(device)
        yield
    finally:
        module.to("cpu")
        if device != "cpu":
            torch.cuda.empty_cache()  # PyTorch would keep the memory, and no compiler could have it
