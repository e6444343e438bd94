"""Training of the miniature Stable Diffusion: the VAE, then UNet and text encoder together."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ubgen.miniature import networks
from ubgen.miniature.captions import generator_caption
from ubgen.miniature.training import fit, seed_all
from ubgen.miniature.world import Factors, biased_world, fair_world, render_many


@dataclass(frozen=True)
class Budget:
    """Steps and images of every training run; the defaults made the weights that ship with the project."""

    vae_steps: int = 3000
    vae_images: int = 12000
    unet_steps: int = 8400
    unet_images: int = 24000
    oracle_steps: int = 1500
    clip_steps: int = 1500
    qalign_steps: int = 1000
    scorer_images: int = 24000


def to_float(images_BHW3: np.ndarray) -> Tensor:
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(work: Path, budget: Budget, seed: int) -> AutoencoderKL:
    """Autoencoder on pictures of both worlds: squared error, and a weak KL term that keeps the latents small."""
    seed_all(seed)
    half = budget.vae_images // 2
    fair = fair_world(severity_range=(0.0, 0.3), kind_probabilities=(0.45, 0.0, 0.2, 0.35))
    images = np.concatenate(
        [render_many(fair, half, seed + 1)[0], render_many(biased_world(), half, seed + 2)[0]]
    )
    vae = networks.vae()

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (16,), generator=generator)
        batch = to_float(images[pick.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return (decoded.float() - batch).square().mean() + 2e-5 * kl

    fit(
        "VAE",
        vae,
        loss,
        steps=budget.vae_steps,
        lr=2e-3,
        seed=seed,
        checkpoint=work / "vae.pt",
        average=0.998,
    )
    spread = encode_images(vae, images[:2000]).std().item()
    vae.register_to_config(scaling_factor=1.0 / spread)
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images_BHW3: np.ndarray) -> Tensor:
    """Mean latents, unscaled, (B, 8, 8, 8)."""
    batches = [to_float(images_BHW3[i : i + 64]) for i in range(0, len(images_BHW3), 64)]
    return torch.cat([vae.encode(b).latent_dist.mean for b in batches])


class Denoiser(nn.Module):
    """UNet and text encoder, trained as one model."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


def train_denoiser(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, budget: Budget, seed: int
) -> Denoiser:
    """Noise prediction on captioned images of the biased world; 10 % of the captions are dropped for guidance.

    The squared errors are weighted by min(SNR, 5) / SNR (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR
    Weighting Strategy", for noise prediction): after 1,000 steps the oracle knew the class of 22 % of the pictures, and
    of 17 % without the weights.
    """
    seed_all(seed)
    images, factors = render_many(biased_world(), budget.unet_images, seed + 3)
    latents = encode_images(vae, images) * vae.config.scaling_factor
    model = Denoiser(networks.unet(), networks.text_encoder(tokenizer))
    model.unet.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    table = {
        k: v for k, v in networks.SCHEDULER_CONFIG.items() if k not in ("skip_prk_steps", "set_alpha_to_one")
    }
    noising = DDPMScheduler(**table)
    snr = noising.alphas_cumprod / (1 - noising.alphas_cumprod)
    weights = snr.clamp(max=5) / snr

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(latents), (64,), generator=generator)
        ids = tokenise(tokenizer, captions(factors, pick.tolist(), generator))
        t = torch.randint(0, 1000, (64,), generator=generator)
        noise = torch.randn(latents[pick].shape, generator=generator)
        noisy = noising.add_noise(latents[pick], noise, t).contiguous(memory_format=torch.channels_last)
        context = model.text_encoder(ids).last_hidden_state
        error = model.unet(noisy, t, encoder_hidden_states=context).sample - noise
        return (error.square().mean(dim=(1, 2, 3)) * weights[t]).mean()

    checkpoint = work / "unet.pt"
    fit(
        "UNet", model, loss, steps=budget.unet_steps, lr=1e-3, seed=seed, checkpoint=checkpoint, average=0.998
    )
    model.unet.to(memory_format=torch.contiguous_format)
    return model


def captions(factors: list[Factors], pick: list[int], generator: torch.Generator) -> list[str]:
    rng = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))
    return ["" if rng.uniform() < 0.1 else generator_caption(factors[i], rng) for i in pick]


def tokenise(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
