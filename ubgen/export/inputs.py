"""Real inputs for the parity check: prompts, a denoising trajectory, its final latents, the decoded images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ubgen.classes import load_classes
from ubgen.diffusion import StableDiffusion, encode_prompts, initial_noise, sample, with_sampler
from ubgen.errors import UserError
from ubgen.export.networks import VaeDecoder
from ubgen.export.spec import ParityInputs


@dataclass(frozen=True)
class RealInputs:
    """`unet_calls`: the UNet's inputs at the first two, the middle and the last call (2 rows for each image)."""

    names: list[str]
    input_ids: Tensor
    unet_calls: list[Mapping[str, Tensor]]
    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def real_inputs(sd: StableDiffusion, settings: ParityInputs) -> RealInputs:
    """Sample `settings.images` images with PyTorch and keep what each network saw on the way."""
    classes = load_classes(settings.classes)
    names = [classes.names[i % len(classes)] for i in range(settings.images)]
    ids = tokenize(sd, [*names, ""])
    calls: list[Mapping[str, Tensor]] = []

    def recording_unet(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        calls.append({"latents": latents, "timestep": timestep.float(), "context": context})
        return sd.unet(latents, timestep, context, return_dict=False)[0]

    latents = sample(
        recording_unet,
        with_sampler(sd.scheduler, "pndm"),
        torch.stack([initial_noise(settings.seed, i, 0, sd.latent_shape()) for i in range(settings.images)]),
        encode_prompts(sd, names),
        encode_prompts(sd, [""]),
        steps=settings.steps,
        guidance=settings.guidance,
    )
    kept = [calls[i] for i in sorted({0, 1, len(calls) // 2, len(calls) - 1})]
    return RealInputs(names, ids, kept, latents, VaeDecoder(sd)(latents))


def tokenize(sd: StableDiffusion, prompts: list[str]) -> Tensor:
    """(B,S) int64 ids, as `encode_prompts` makes them."""
    if sd.tokenizer is None:
        raise UserError(f"{sd.path / 'tokenizer'}: no such directory; expected the CLIP tokenizer's files")
    length = min(sd.tokenizer.model_max_length, sd.text_encoder.config.max_position_embeddings)
    tokens = sd.tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids
