"""What a run trains and what it trains with: networks, optimisers, encoded texts, and the means that it keeps."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.core import probes
from ubgen.core.classes import ClassList, compared
from ubgen.core.errors import UserError
from ubgen.diffusion import StableDiffusion, add_lora, encode_prompts, load_stable_diffusion, with_sampler
from ubgen.rewards import ClassMoments, Clip, Discriminator, QAlign
from ubgen.train.config import DiscriminatorConfig, GeneratorConfig, TrainConfig, networks_needed

HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HELD_BACK = 256  # images that the discriminator's accuracy is taken over
FIRST_SCALE = (
    2.0**12
)  # of the float16 loss; PyTorch's 2^16 overflows at once, and each overflow costs an update's time


class DiscriminatorHealth:
    """Whether the discriminator has learned anything.

    Every batch is judged before the discriminator is trained on it; the accuracy is the mean over a queue of the last
    256 images, and as many texts. A random start may be right by luck: it then still points where its seed does. So the
    directions are compared as well in which its logit rises, now and at its start.
    """

    def __init__(self, network: Discriminator) -> None:
        self._start = copy.deepcopy(network).requires_grad_(False)
        self._queue: list[tuple[float, int]] = []  # accuracy on a batch, and its images

    def judged(self, accuracy: float, images: int) -> None:
        """The share of right answers on a batch that the discriminator has not been trained on."""
        self._queue.append((accuracy, images))
        while sum(count for _, count in self._queue[1:]) >= HELD_BACK:
            del self._queue[0]

    def accuracy(self) -> float:
        """0 to 1; one half is chance."""
        return sum(share * count for share, count in self._queue) / sum(count for _, count in self._queue)

    def directions(self, network: Discriminator, images_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (D,) of the mean logit by the images' features, of `network` and of its random start."""
        x = images_BD.detach().requires_grad_()
        now, start = (torch.autograd.grad(net(x).mean(), x)[0].sum(0) for net in (network, self._start))
        return now, start

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self._queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._queue = [(float(accuracy), int(images)) for accuracy, images in state["queue"]]


@dataclass
class Adversary:
    """The discriminator and its training: the optimiser and the texts of Eq. 5."""

    network: Discriminator
    optimizer: torch.optim.Optimizer
    class_text_ND: Tensor  # CLIP features of the bare class names
    health: DiscriminatorHealth


class MovingAverage:
    """The exponential moving average of the LoRA.

    Its decay grows from 0.1 to `decay`, as in `torch_ema` and diffusers, so that the untrained LoRA is soon forgotten.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._means = [p.detach().clone() for p in parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """After each update of the generator."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """The average in place of the LoRA's weights; a second call puts them back."""
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._means, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mean, saved in zip(self._means, state["means"], strict=True):
            mean.copy_(saved)
        self._updates = int(state["updates"])


@dataclass
class TrainState:
    """All that an update needs. Networks that the losses do not use are None."""

    sd: StableDiffusion
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
    attention: str  # a line for the log
    average: MovingAverage | None = None
    class_moments: ClassMoments | None = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The LoRA as the run's result will have it: the moving average, where there is one."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def autocast(self) -> torch.autocast:
        """Mixed precision for the UNet: a float32 LoRA on half-precision weights. The others cast for themselves."""
        # no cache: a LoRA weight first cast in a step without gradient would be reused, without one, where it trains
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False)


def build_state(config: TrainConfig, classes: ClassList, device: torch.device) -> TrainState:
    """Load and freeze the networks, add what is trained, and encode all texts, once."""
    dtype, losses = HALF[config.precision], config.losses
    sd = load_stable_diffusion(config.networks.stable_diffusion, dtype, device)
    lora = _equip_unet(sd.unet, config)
    attention = set_attention(sd.unet, config.attention, device, config.precision)
    needed = networks_needed(losses)
    clip = Clip.load(config.networks.clip, dtype, device) if "clip" in needed else None
    places, qalign = config.networks, None
    if "qalign" in needed:
        qalign = QAlign.load(places.qalign, dtype, device, offloaded=places.qalign_offload)
    prompts = [config.prompt.replace("{name}", name) for name in classes.names]
    descriptions = [config.description.replace("{name}", name) for name in classes.names]
    description_ND = None if clip is None else clip.encode_text(descriptions).float()
    return TrainState(
        sd=sd,
        scheduler=with_sampler(sd.scheduler, config.rollout.sampler),
        clip=clip,
        qalign=qalign,
        lora=lora,
        generator_optimizer=_adamw(lora, config.generator),
        scaler=torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=config.precision == "fp16"),
        adversary=make_adversary(config, clip, classes, device),
        prompts_NSD=torch.cat([encode_prompts(sd, prompts[i : i + 64]) for i in range(0, len(prompts), 64)]),
        uncond_1SD=encode_prompts(sd, [""]),
        descriptions_ND=description_ND,
        device=device,
        dtype=dtype,
        attention=attention,
        average=MovingAverage(lora, config.generator.ema) if config.generator.ema else None,
        class_moments=None
        if description_ND is None or not losses.class_level
        else ClassMoments(description_ND, losses.class_queue, losses.class_directions),
    )


def _equip_unet(unet: Any, config: TrainConfig) -> list[nn.Parameter]:
    settings = config.generator
    lora = add_lora(unet, settings.lora_rank, settings.lora_alpha, config.seed, settings.lora_layers)
    if config.rollout.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    return lora


def set_attention(unet: Any, wanted: str, device: torch.device, precision: str) -> str:
    """Install `wanted` ("auto", "xformers", "sdpa") in `unet`; returns a line for the log.

    UserError when xformers is demanded but cannot run here.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    dtype = str(HALF[precision]).removeprefix("torch.")
    reason = "not asked for" if wanted == "sdpa" else probes.xformers_problem(str(device), dtype)
    if wanted == "xformers" and reason:
        raise UserError(f"attention: xformers cannot be used: {reason}; use auto or sdpa")
    # set directly: enable_xformers_memory_efficient_attention() first tries a float32 call that newer GPUs lack
    unet.set_attn_processor(AttnProcessor2_0() if reason else XFormersAttnProcessor())
    return f"attention: PyTorch's SDPA (xformers: {reason})" if reason else "attention: xformers"


def make_adversary(
    config: TrainConfig, clip: Clip | None, classes: ClassList, device: torch.device
) -> Adversary | None:
    """A fresh discriminator with its optimiser and its texts; None where the entire alignment loss is off."""
    if config.losses.entire == 0 or clip is None:
        return None
    if len({compared(name) for name in classes.names}) < 2:
        raise UserError("classes: the entire alignment loss needs at least two different class names")
    settings = config.discriminator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Discriminator(
            clip.dim, settings.hidden, settings.activation, settings.slope, settings.features
        )
    network.to(device)
    optimizer, health = _adamw(list(network.parameters()), settings), DiscriminatorHealth(network)
    return Adversary(network, optimizer, clip.encode_text(classes.names).float(), health)


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
