"""Sampling with classifier-free guidance: `sample` without a graph, `rollout` with gradient at chosen steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.diffusion.schedule import Call, schedule
from ubgen.ops import guided_step

Network = Callable[[Tensor, Tensor, Tensor], Any]
"""(latents, timestep_B, context) -> noise, as a tensor or in `.sample`: a diffusers UNet."""

GuidedNetwork = Callable[[Tensor, Tensor], Tensor]
"""(latents (B,C,h,w), timestep (B,)) -> guided noise, all float32: a compiled UNet with its prompts bound."""


@torch.no_grad()
def sample(
    unet: Network,
    scheduler: Any,
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor,
    *,
    steps: int,
    guidance: float,
    step_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoise `latents` (B,C,h,w float32, standard normal) under `cond` (B,S,D); no gradient.

    Each step calls `unet` once on 2B rows, the unconditional ones first, cast to the dtype of `cond`.
    `uncond` is (B,S,D) or (1,S,D). `scheduler`: see `schedule`. Only DDPM draws noise: `step_noise`
    (calls,B,C,h,w) where given, otherwise from `generator`.
    """
    context = _context(cond, uncond)
    calls = schedule(scheduler, steps)
    return _denoise(
        lambda x, call: _predict(unet, x, call, context), calls, latents, guidance, step_noise, generator
    )


@torch.no_grad()
def sample_guided(unet: GuidedNetwork, scheduler: Any, latents: Tensor, *, steps: int) -> Tensor:
    """`sample` for a network that applies guidance itself, called once a step on B rows."""

    def predict(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        e = unet(x, torch.full((len(x),), float(call.timestep), device=x.device))
        return e, e  # e + 1 * (e - e) is e to the last bit

    return _denoise(predict, schedule(scheduler, steps), latents, 1.0)


def _denoise(
    predict: Callable[[Tensor, Call], tuple[Tensor, Tensor]],
    calls: Sequence[Call],
    latents: Tensor,
    guidance: float,
    step_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The sampler's loop; `predict` gives unconditional and conditional noise."""
    x = latents.float().contiguous()
    entered, history = x, list[Tensor]()
    for index, call in enumerate(calls):
        e_uncond, e_cond = predict(x, call)
        reference, entered = (entered if call.restart else x), x
        used = history[: len(call.weights) - 1]
        x, e = guided_step(reference, e_uncond, e_cond, used, call.a, call.b, guidance, list(call.weights))
        if call.s:
            x = x + call.s * _noise(index, x, step_noise, generator)
        if call.keep:
            history = [e, *history][:3]
    return x


def rollout(
    unet: Network,
    scheduler: Any,
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor,
    *,
    steps: int,
    guidance: float,
    grad_steps: Sequence[int],
    step_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    detach_unet_input: bool = False,
) -> Tensor:
    """`sample`, differentiable at the UNet calls numbered in `grad_steps` (from 0) only.

    At those calls gradient flows through both guidance branches into the UNet's weights and, unless
    `detach_unet_input`, into its latent input. At every other call the UNet's output is a constant. The
    scheduler's update is differentiated from the first of those calls on, so gradient also travels along x
    itself to the earlier ones. Before it, nothing needs a gradient.
    """
    calls, trained = schedule(scheduler, steps), set(grad_steps)
    if not trained <= set(range(len(calls))):
        raise UserError(f"grad_steps: {sorted(trained)} must lie in 0..{len(calls) - 1}")
    x, context = latents.float(), _context(cond, uncond)
    entered, history = x, list[Tensor]()
    for index, call in enumerate(calls):
        with torch.set_grad_enabled(index in trained and torch.is_grad_enabled()):
            e_uncond, e_cond = _predict(unet, x.detach() if detach_unet_input else x, call, context)
            e = e_uncond + guidance * (e_cond - e_uncond)
        reference, entered = (entered if call.restart else x), x
        mixed = sum(w * past for w, past in zip(call.weights, [e, *history], strict=False))
        x = call.a * reference + call.b * mixed
        if call.s:
            x = x + call.s * _noise(index, x, step_noise, generator)
        if call.keep:
            history = [e, *history][:3]
    return x


def decode(vae: Any, latents_BChw: Tensor, checkpoint: bool = False) -> Tensor:
    """Latents -> float32 images B3HW on the [0, 1] scale, NOT clamped: clamping would kill gradients.

    `vae` is a diffusers AutoencoderKL. `checkpoint` recomputes the decoder in the backward pass.
    """
    scaled = (latents_BChw / vae.config.scaling_factor).to(vae.dtype)
    if checkpoint and torch.is_grad_enabled():
        decoded = torch.utils.checkpoint.checkpoint(_decoder_output, vae, scaled, use_reentrant=False)
    else:
        decoded = _decoder_output(vae, scaled)
    return decoded.float() / 2 + 0.5


def _decoder_output(vae: Any, scaled_latents: Tensor) -> Tensor:
    return vae.decode(scaled_latents, return_dict=False)[0]


def _context(cond: Tensor, uncond: Tensor) -> Tensor:
    return torch.cat([uncond.expand_as(cond), cond])


def _predict(unet: Network, x: Tensor, call: Call, context: Tensor) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional noise, float32, from one call on the doubled batch."""
    doubled = torch.cat([x, x]).to(context.dtype)
    timestep = torch.full((doubled.shape[0],), call.timestep, dtype=torch.int64, device=x.device)
    output = unet(doubled, timestep, context)
    noise = output if isinstance(output, Tensor) else output.sample
    e_uncond, e_cond = noise.float().chunk(2)
    return e_uncond, e_cond


def _noise(index: int, x: Tensor, step_noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if step_noise is not None:
        return step_noise[index].to(x)
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)
