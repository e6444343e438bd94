"""What a run trains and what it trains with: networks, optimisers, encoded texts, and the means that it keeps."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ubgen.core import probes
from ubgen.core.classes import ClassList, compared
from ubgen.core.errors import UserError
from ubgen.diffusion import StableDiffusion, add_lora, encode_prompts, load_stable_diffusion, with_sampler
from ubgen.rewards import Centre, Clip, Discriminator, QAlign
from ubgen.train.config import DiscriminatorConfig, GeneratorConfig, TrainConfig, networks_needed

HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CENTRE = "centre."  # before the names of the centre's tensors in a checkpoint
HELD_BACK = 256  # images that the discriminator's accuracy is taken over
FIRST_SCALE = (
    2.0**12
)  # of the float16 loss; PyTorch's 2^16 overflows at once, and each overflow costs an update's time
MOMENTUM = 0.9  # of the running mean of similarity: a single batch says too little


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
    """The discriminator and its training: the optimiser, the texts of Eq. 5, and the images' centre if it is used."""

    network: Discriminator
    optimizer: torch.optim.Optimizer
    class_text_ND: Tensor  # CLIP features of the bare class names, projected
    health: DiscriminatorHealth
    centre: Centre | None = None

    def project(self, features_BD: Tensor) -> Tensor:
        """CLIP features of images -> the discriminator's input."""
        return features_BD if self.centre is None else self.centre.images(features_BD)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the network, and of the centre if there is one."""
        centre = {} if self.centre is None else self.centre.state_dict(prefix=CENTRE)
        return {**self.network.state_dict(), **centre}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        network = {name: tensor for name, tensor in state.items() if not name.startswith(CENTRE)}
        self.network.load_state_dict(network)
        if self.centre is not None:
            centre = {name.removeprefix(CENTRE): state[name] for name in state.keys() - network.keys()}
            self.centre.load_state_dict(centre)


class WeightAverage:
    """The mean of the LoRA over the last updates: stochastic weight averaging (Izmailov et al. 2018).

    Two players circle around what they approach. Call `add` after each update that counts. `apply` puts the mean in
    place of the weights, and multiplies its change of the UNet's weights by `strength`.
    """

    def __init__(self, parameters: list[nn.Parameter], strength: float) -> None:
        self._parameters = parameters
        self._factor = strength**0.5  # for either of the two matrices whose product is a layer's change
        self._sums = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total += parameter
        self._count += 1

    @torch.no_grad()
    def apply(self) -> None:
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.copy_(total / self._count * self._factor)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for total, saved in zip(self._sums, state["sums"], strict=True):
            total.copy_(saved)
        self._count = int(state["count"])


class EntireRise:
    """The share of its weight that the entire alignment loss has, by `losses.entire_rise`.

    It grows as the images' CLIP similarity rises over the base generator's, and shrinks where similarity falls back, so
    that the adversary takes no more than was gained.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._base = self._count = 0.0
        self._mean: float | None = None

    def observe_base(self, similarity: float) -> None:
        """The mean similarity of one warm-up update, whose images are the base generator's."""
        self._base = (self._base * self._count + similarity) / (self._count + 1)
        self._count += 1

    def observe(self, similarity: float) -> None:
        """The mean similarity of one update after the warm-up."""
        before = self._base if self._mean is None else self._mean
        self._mean = MOMENTUM * before + (1 - MOMENTUM) * similarity

    def share(self) -> float:
        """0 to 1, for the next update."""
        rise = 0.0 if self._mean is None else self._mean - self._base
        return min(1.0, max(0.0, (rise - self._low) / (self._high - self._low)))

    def state_dict(self) -> dict[str, float | None]:
        return {"base": self._base, "count": self._count, "mean": self._mean}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self._base, self._count = state["base"] or 0.0, state["count"] or 0.0
        self._mean = state["mean"]


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
    average: WeightAverage | None = None
    rise: EntireRise | None = None

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
    qalign = QAlign.load(config.networks.qalign, dtype, device) if "qalign" in needed else None
    prompts = [config.prompt.replace("{name}", name) for name in classes.names]
    descriptions = [config.description.replace("{name}", name) for name in classes.names]
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
        descriptions_ND=None if clip is None else clip.encode_text(descriptions).float(),
        device=device,
        dtype=dtype,
        attention=attention,
        average=WeightAverage(lora, config.generator.average_strength)
        if config.generator.average_last
        else None,
        rise=EntireRise(*losses.entire_rise) if losses.entire > 0 and losses.entire_rise else None,
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
            clip.dim,
            settings.hidden,
            settings.activation,
            settings.slope,
            "normalised" if settings.features == "normalised" else "raw",
        )
    network.to(device)
    optimizer, health = _adamw(list(network.parameters()), settings), DiscriminatorHealth(network)
    class_text_ND = clip.encode_text(classes.names).float()
    if settings.features != "centred":
        return Adversary(network, optimizer, class_text_ND, health)
    return Adversary(network, optimizer, Centre.texts(class_text_ND), health, Centre(clip.dim).to(device))


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
