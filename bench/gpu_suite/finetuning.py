"""The part "train": one update of the generator, with and without checkpointing, by each attention kernel."""

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.gpu_suite.networks import (
    qalign_bytes,
    random_clip,
    random_prompts,
    random_qalign,
    random_unet,
    random_vae,
)
from bench.gpu_suite.suite import Suite
from ubgen.benchmark import compare, peak_memory
from ubgen.diffusion import StableDiffusion, add_lora
from ubgen.rewards import Clip, Discriminator, QAlign
from ubgen.train.attention import set_attention
from ubgen.train.config import NetworkPaths, RolloutConfig, TrainConfig
from ubgen.train.players import HALF, Adversary, Players
from ubgen.train.stream import Batch, draw_batch
from ubgen.train.update import generator_update

NAMES = ("tench", "goldfish", "cock", "hen", "ostrich", "brambling", "robin", "jay")
ROOM = 30e9  # bytes for everything besides Q-Align's weights


@dataclass(frozen=True)
class Way:
    checkpointing: bool
    attention: str

    @property
    def name(self) -> str:
        return f"{self.attention}, checkpointing {'on' if self.checkpointing else 'off'}"


def run(suite: Suite) -> None:
    """Random networks of full size: the LoRA's float32 gradient through the sampler, decoder, CLIP and Q-Align."""
    config = _config(suite)
    players = _players(suite, config)
    batch = draw_batch(config, NAMES, suite.sizes.latent, "train", 0, config.batch_size, 0, 1)
    sides, peaks = {}, {}
    for way in [Way(c, a) for a in ("sdpa", "xformers") for c in (True, False)]:
        with suite.guard(way.name):
            update = partial(_update, players, config, batch, way)
            with peak_memory(suite.device) as peak:
                update()
            sides[way.name], peaks[way.name] = update, peak.peak / 1e9
        _forget_gradients(players)
    for name, timing in compare(sides, suite.device, seconds=suite.share(0.5), least=2, warm=True).items():
        suite.add(
            timing,
            variant=name,
            batch=config.batch_size,
            precision=config.precision,
            quality=players.qalign is not None,
            ms=timing.median,
            q1=timing.q1,
            q3=timing.q3,
            rounds=timing.rounds,
            images_per_second=timing.per_second(config.batch_size),
            peak_gb=peaks[name],
        )


def _update(players: Players, config: TrainConfig, batch: Batch, way: Way) -> None:
    unet = players.sd.unet
    set_attention(unet, way.attention, players.device, config.precision)
    if way.checkpointing:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    unet.train(way.checkpointing)
    rollout = replace(config.rollout, gradient_checkpointing=way.checkpointing)
    generator_update(players, replace(config, rollout=rollout), batch)


def _config(suite: Suite) -> TrainConfig:
    return TrainConfig(
        networks=NetworkPaths("", "", ""),  # nothing is read
        classes="",
        batch_size=suite.sizes.train_batch,
        precision="no" if suite.small else "bf16",
        rollout=RolloutConfig(steps=suite.sizes.steps, grad_steps=min(5, suite.sizes.steps - 1)),
    )


def _players(suite: Suite, config: TrainConfig) -> Players:
    sizes, device, dtype = suite.sizes, suite.device, HALF[config.precision]
    unet = random_unet(sizes.unet, device, dtype)
    lora = add_lora(unet, sizes.lora_rank)
    clip = random_clip(sizes.clip, device, dtype)
    qalign = _qalign(suite, dtype)
    cond, uncond = random_prompts(sizes, len(NAMES), device)
    sd = StableDiffusion(unet, random_vae(sizes.vae, device, dtype), None, None, None, Path())
    return Players(
        sd=sd,
        twin=None,  # as in every precision but float32
        scheduler=config.rollout.sampler,
        clip=clip,
        qalign=qalign,
        lora=lora,
        generator_optimizer=torch.optim.AdamW(lora, lr=config.generator.lr),
        scaler=torch.amp.GradScaler(torch.device(device).type, enabled=False),
        adversary=_adversary(clip, device),
        prompts_NSD=cond.to(dtype),
        uncond_1SD=uncond.to(dtype),
        descriptions_ND=torch.randn(len(NAMES), clip.dim, device=device),
        device=torch.device(device),
        dtype=dtype,
        attention="",
    )


def _adversary(clip: Clip, device: str) -> Adversary:
    network: nn.Module = Discriminator(clip.dim).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    return Adversary(network, optimizer, torch.randn(len(NAMES), clip.dim, device=device))  # type: ignore[arg-type]


def _qalign(suite: Suite, dtype: torch.dtype) -> QAlign | None:
    needed = qalign_bytes(suite.sizes.qalign) + ROOM
    if suite.device != "cpu" and needed > torch.cuda.mem_get_info(suite.device)[0]:
        suite.skip("the quality loss", f"Q-Align and the rest need about {needed / 1e9:.0f} GB of memory")
        return None
    return random_qalign(suite.sizes.qalign, suite.device, dtype)


def _forget_gradients(players: Players) -> None:
    """Also after an update that failed half-way."""
    players.generator_optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if players.device.type == "cuda":
        torch.cuda.empty_cache()
