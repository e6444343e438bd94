"""The networks of a run: the frozen ones, the two that are trained, and their optimisers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.core.classes import ClassList
from ubgen.core.config import require_directory, resolve_path
from ubgen.core.errors import UserError
from ubgen.diffusion import (
    FusedTwin,
    StableDiffusion,
    add_lora,
    encode_prompts,
    load_stable_diffusion,
    with_sampler,
)
from ubgen.rewards import Centre, Clip, Discriminator, QAlign
from ubgen.train.attention import set_attention
from ubgen.train.average import Average
from ubgen.train.config import DiscriminatorConfig, GeneratorConfig, LossConfig, TrainConfig
from ubgen.train.pace import Pace
from ubgen.train.threads import gradients_on_one_thread, one_thread

HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CENTRE = "centre."  # before the names of the centre's tensors in a checkpoint
_FILES = {
    "stable_diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "qalign": ("config.json",),
}


@dataclass
class Adversary:
    """The discriminator, and what it takes to train it."""

    network: Discriminator
    optimizer: torch.optim.Optimizer
    names_ND: (
        Tensor  # CLIP features of the bare class names, as the discriminator sees them: the texts of Eq. 5
    )
    centre: Centre | None = None

    def see(self, features_BD: Tensor) -> Tensor:
        """CLIP features of images, as the discriminator sees them."""
        return features_BD if self.centre is None else self.centre.images(features_BD)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the network, and of the centre where there is one."""
        centre = {} if self.centre is None else self.centre.state_dict(prefix=CENTRE)
        return {**self.network.state_dict(), **centre}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What `state_dict` gave."""
        network = {name: tensor for name, tensor in state.items() if not name.startswith(CENTRE)}
        self.network.load_state_dict(network)
        if self.centre is not None:
            centre = {name.removeprefix(CENTRE): state[name] for name in state.keys() - network.keys()}
            self.centre.load_state_dict(centre)


@dataclass
class Players:
    """All that an update needs. Networks that the losses do not use are None."""

    sd: StableDiffusion
    twin: FusedTwin | None  # of a UNet in float32
    scheduler: Any
    clip: Clip | None
    qalign: QAlign | None
    lora: list[nn.Parameter]
    generator_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    adversary: Adversary | None
    prompts_NSD: Tensor
    uncond_1SD: Tensor
    descriptions_ND: Tensor | None  # CLIP features of "photo of <class>"
    device: torch.device
    dtype: torch.dtype
    attention: str
    average: Average | None = None
    pace: Pace | None = None

    def without_gradient(self) -> Any:
        """The UNet, with the LoRA as it is now, for calls that need no gradient: most of a rollout's."""
        return self.sd.unet if self.twin is None else self.twin.refresh()

    def autocast(self) -> torch.autocast:
        """Mixed precision for the UNet: a float32 LoRA on half-precision weights. The others cast for themselves."""
        # no cache: a LoRA weight first cast in a step without gradient would be reused, without one, where it trains
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False)


def require_networks(config: TrainConfig) -> None:
    """UserError naming the option whose directory is not there; nothing is loaded."""
    for name in networks_needed(config.losses):
        option = f"--networks.{name.replace('_', '-')}"
        require_directory(getattr(config.networks, name), option, *_FILES[name])


def networks_needed(losses: LossConfig) -> list[str]:
    """The networks that a run with these losses reads."""
    needed = {
        "stable_diffusion": True,
        "clip": losses.entire > 0 or losses.individual > 0 or losses.log_unused,
        "qalign": losses.quality > 0 or losses.log_unused,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def network_paths(config: TrainConfig) -> dict[str, Path]:
    """The directories of the networks that this run reads."""
    return {name: resolve_path(getattr(config.networks, name)) for name in networks_needed(config.losses)}


def load_players(config: TrainConfig, classes: ClassList, device: torch.device) -> Players:
    """Read, freeze and equip the networks; texts are encoded once, here."""
    dtype = HALF[config.precision]
    sd = load_stable_diffusion(config.networks.stable_diffusion, dtype, device)
    lora = _equip_unet(sd.unet, config)
    attention = set_attention(sd.unet, config.attention, device, config.precision)
    clip, qalign = _load_rewards(config, dtype, device)
    prompts = [config.prompt.replace("{name}", name) for name in classes.names]
    descriptions = [config.description.replace("{name}", name) for name in classes.names]
    with one_thread():
        prompts_NSD = torch.cat([encode_prompts(sd, prompts[i : i + 64]) for i in range(0, len(prompts), 64)])
        uncond_1SD = encode_prompts(sd, [""])
        descriptions_ND = None if clip is None else clip.encode_text(descriptions).float()
        adversary = make_adversary(config, clip, classes, device)
    return Players(
        sd=sd,
        twin=FusedTwin(sd.unet) if dtype == torch.float32 else None,
        scheduler=with_sampler(sd.scheduler, config.rollout.sampler),
        clip=clip,
        qalign=qalign,
        lora=lora,
        generator_optimizer=_adamw(lora, config.generator),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        adversary=adversary,
        prompts_NSD=prompts_NSD,
        uncond_1SD=uncond_1SD,
        descriptions_ND=descriptions_ND,
        device=device,
        dtype=dtype,
        attention=attention,
        average=Average(lora, config.generator.average_strength) if config.generator.average_last else None,
        pace=Pace(config.losses)
        if discriminator_in_play(config.losses) and config.losses.entire_rise
        else None,
    )


def discriminator_in_play(losses: LossConfig) -> bool:
    """Whether the adversarial game is played at all."""
    return losses.entire > 0


def _equip_unet(unet: Any, config: TrainConfig) -> list[nn.Parameter]:
    settings = config.generator
    lora = add_lora(unet, settings.lora_rank, settings.lora_alpha, config.seed, settings.lora_layers)
    gradients_on_one_thread(unet)
    if config.rollout.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    return lora


def _load_rewards(
    config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Clip | None, QAlign | None]:
    needed = networks_needed(config.losses)
    clip = Clip.load(config.networks.clip, dtype, device) if "clip" in needed else None
    qalign = QAlign.load(config.networks.qalign, dtype, device) if "qalign" in needed else None
    return clip, qalign


def make_adversary(
    config: TrainConfig, clip: Clip | None, classes: ClassList, device: torch.device
) -> Adversary | None:
    """A fresh discriminator with its optimiser and its texts; None where the game is not played."""
    if not discriminator_in_play(config.losses) or clip is None:
        return None
    if len(set(classes.names)) < 2:
        raise UserError("classes: the entire alignment loss needs at least two different class names")
    settings = config.discriminator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Discriminator(
            clip.dim,
            settings.hidden,
            settings.activation,
            settings.slope,
            "normalised" if settings.features == "normalised" else "raw",
        )
    network.to(device)
    optimizer = _adamw(list(network.parameters()), settings)
    names_ND = clip.encode_text(classes.names).float()
    if settings.features != "centred":
        return Adversary(network, optimizer, names_ND)
    return Adversary(network, optimizer, Centre.texts(names_ND), Centre(clip.dim).to(device))


def _adamw(
    parameters: list[nn.Parameter], settings: GeneratorConfig | DiscriminatorConfig
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
