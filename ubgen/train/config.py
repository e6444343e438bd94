"""The options of a training run.

Defaults are the paper's (Table 5), or the authors' released code's where it is silent.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ubgen.core.config import require_directory, resolve_path, to_dict
from ubgen.core.errors import UserError

PAPER_BATCH = 32
"""Images per update in the authors' run: eight GPUs with four each."""
_MAY_BE_ZERO = {
    "losses.entire",
    "losses.individual",
    "losses.quality",
    "losses.class_mean",
    "losses.class_spread",
    "losses.trust",
    "generator.weight_decay",
    "generator.ema",
    "discriminator.weight_decay",
    "discriminator.warmup_epochs",
    "discriminator.warmup_updates",
    "output.grid_every",
    "output.keep_checkpoints",
}
_PAIRS = {"generator.betas", "discriminator.betas"}  # have rules of their own
_MAY_BE_NEGATIVE = {"seed", "rollout.guidance", "discriminator.slope"}
_FILES = {
    "stable_diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "clip": (),
    "qalign": ("config.json",),
}


@dataclass(frozen=True)
class NetworkPaths:
    """The frozen networks, local directories. "ubgen:..." lies inside the installed package."""

    stable_diffusion: str
    """Stable Diffusion 1.x in diffusers layout."""
    clip: str
    """CLIP as an open_clip directory, or as a transformers directory such as openai/clip-vit-large-patch14."""
    qalign: str
    """Q-Align with config.json and the public checkpoint's weights."""
    qalign_offload: bool = False
    """Keep Q-Align's layers in the host's memory and bring each to the GPU when its turn comes: 15 GB less there."""


@dataclass(frozen=True)
class RolloutConfig:
    """How training images are sampled."""

    sampler: Literal["ddpm", "ddim", "pndm"] = "ddpm"
    """Sampler of the training images. Synthesis uses PNDM whatever is set here."""
    steps: int = 50
    """Sampling steps."""
    guidance: float = 2.0
    """Classifier-free guidance scale."""
    grad_steps: int = 5
    """Steps that carry gradient: evenly spaced, with a random start per update."""
    detach_unet_input: bool = False
    """Stop the gradient at the UNet's latent input (the remedy if gradients blow up)."""
    gradient_checkpointing: bool = True
    """Recompute the activations of UNet, decoder and Q-Align in the backward pass: less memory, more time."""
    score_batch: int | None = None
    """Images decoded and shown to CLIP at a time; the gradient is the same. None: 1 on a GPU, for its memory, and all
    on a CPU."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of Eq. 8's terms, and of three more that are not the paper's but ours; 0 switches a term off."""

    entire: float = 1.0
    """Weight of the entire alignment loss (Eq. 5): the adversarial term."""
    individual: float = 1.0
    """Weight of the individual alignment loss (Eq. 6): image against "photo of <class>"."""
    quality: float = 0.1
    """Weight of the quality loss (Eq. 7)."""
    gan: Literal["nonsaturating", "saturating"] = "nonsaturating"
    """Generator's form of Eq. 5: -log D (as released), or log(1 - D) (as printed)."""
    log_unused: bool = True
    """Also measure the rewards whose weight is 0, without gradient; otherwise their networks are not loaded."""
    class_mean: float = 0.0
    """Ours, not the paper's. Weight of the class-level term against bias: within every class the mean of what an image
    shows beside its class should be the base generator's mean over all classes."""
    class_spread: float = 0.0
    """Ours, not the paper's. Weight of the class-level term for variety: the same for the variance, where too small."""
    class_queue: int = 24
    """Last images of a class whose mean and variance are taken. A class with fewer has no class-level loss."""
    class_directions: int = 8
    """Directions of CLIP's space on which they are taken: the main ones in which the base generator's images of one
    class differ."""
    trust: float = 0.0
    """Ours, not the paper's. Weight of the trust region: the squared distance between the noise that the tuned and the
    base UNet predict. It is logged whatever its weight."""

    @property
    def class_level(self) -> bool:
        return self.class_mean > 0 or self.class_spread > 0


@dataclass(frozen=True)
class GeneratorConfig:
    """The LoRA on the UNet, and its AdamW."""

    lora_rank: int = 128
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """LoRA scale times rank; the rank itself if not given."""
    lora_layers: Literal["attention", "transformer"] = "attention"
    """Layers with a LoRA: the projections of every attention (the paper), or also the feed-forward layers and the
    projections into and out of the transformer blocks."""
    lr: float = 2e-5
    """Learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 0.1
    """Largest global gradient norm."""
    ema: float = 0.0
    """Decay of the LoRA's exponential moving average, which is then the result; 0: the LoRA after the last update."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The adversary on CLIP features, and its AdamW."""

    hidden: int = 3
    """Width of the hidden layer."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Activation: the paper's ReLU, or LeakyReLU as released."""
    slope: float = 0.2
    """Slope of the LeakyReLU."""
    features: Literal["raw", "normalised"] = "raw"
    """The input: CLIP features as they are, or L2-normalised."""
    lr: float = 1e-5
    """Learning rate against the generator, constant."""
    betas: tuple[float, float] = (0.0, 0.999)
    """AdamW's betas."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup_epochs: float = 1.0
    """Passes over the class list in which the discriminator trains alone, at twice the batch size. The class-level
    terms measure the base generator in it."""
    warmup_updates: int | None = None
    """Length of that phase in updates; replaces warmup_epochs."""
    warmup_until: float | None = None
    """Go on with that phase until the discriminator's accuracy on held-back features is this (0.5 to 1)."""
    warmup_limit: float = 10.0
    """With warmup_until: the longest that phase may be, as a multiple of its set length."""


@dataclass(frozen=True)
class OutputConfig:
    """Pictures and checkpoints."""

    grid_every: int = 50
    """Updates between sample grids; 0 for none."""
    grid_classes: int = 8
    """Classes in a grid, evenly spaced over the list: one column each."""
    grid_rows: int = 2
    """Images per class in a grid."""
    grid_steps: int = 50
    """PNDM steps for the grid."""
    checkpoint_every: int = 50
    """Updates between checkpoints (the warm-up's count too)."""
    keep_checkpoints: int = 3
    """Checkpoints to keep, the newest; 0 keeps all."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    networks: NetworkPaths
    classes: str
    """Class list: a shipped name (imagenet1k, imagenet100, miniature, ...) or a text file, one class per line."""
    prompt: str = "{name}"
    """Prompt for the generator."""
    description: str = "photo of {name}"
    """Text that an image is compared with in the individual alignment loss."""
    batch_size: int = 4
    """Images per update, process and accumulation."""
    accumulate: int | Literal["auto"] = 1
    """Batches per update and process, whose gradients are averaged. "auto": as many as make 32 images of all processes,
    the paper's eight GPUs, so that fewer GPUs run the same algorithm."""
    epochs: float = 3.0
    """Passes over the class list."""
    max_updates: int | None = None
    """Length in generator updates; replaces epochs."""
    seed: int = 42
    """Seed of every random number of the run."""
    precision: Literal["no", "fp16", "bf16"] = "fp16"
    """Mixed precision: frozen networks and activations in half, LoRA, losses and discriminator in float32. bf16 never
    overflows, but has 3 bits less than fp16: pixels and quality scores are coarse in it."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """The UNet's attention: xformers where it computes forward and backward on the device, otherwise PyTorch's."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" uses a GPU if there is one."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def validate(config: TrainConfig) -> None:
    """UserError naming the first option whose value makes no sense."""
    _check_numbers(config)
    for name in ("prompt", "description"):
        if "{name}" not in getattr(config, name):
            raise UserError(f'{name} must contain "{{name}}", the place of the class name')
    _check_combinations(config)


def _check_numbers(config: TrainConfig) -> None:
    for name, value in _numbers(to_dict(config)):
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        least = "0 or more" if name in _MAY_BE_ZERO else "positive"
        if name not in _PAIRS | _MAY_BE_NEGATIVE and (value < 0 or (value == 0 and least == "positive")):
            raise UserError(f"{name} must be {least}, not {value}")
    for player, betas in (
        ("generator", config.generator.betas),
        ("discriminator", config.discriminator.betas),
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"{player}.betas must be at least 0 and below 1, not {betas}")
    if not -(2**63) <= config.seed < 2**63:
        raise UserError(f"seed must be a 64-bit integer, not {config.seed}")


def _check_combinations(config: TrainConfig) -> None:
    if config.rollout.grad_steps > config.rollout.steps:
        raise UserError(f"rollout.grad_steps must be at most rollout.steps ({config.rollout.steps})")
    losses, opponent = config.losses, config.discriminator
    if not any((losses.entire, losses.individual, losses.quality, losses.class_mean, losses.class_spread)):
        raise UserError(
            "losses: all weights of rewards are 0; switch on at least one of entire, individual, quality, class_mean, "
            "class_spread"
        )
    if config.generator.ema >= 1:
        raise UserError(f"generator.ema must be below 1, not {config.generator.ema}")
    warmup = opponent.warmup_epochs if opponent.warmup_updates is None else opponent.warmup_updates
    if opponent.warmup_until is not None:
        if not 0.5 <= opponent.warmup_until <= 1:
            raise UserError(f"discriminator.warmup_until must lie in 0.5 to 1, not {opponent.warmup_until}")
        if losses.entire > 0 and warmup == 0:
            raise UserError("discriminator.warmup_until needs a warm-up to go on with, whose length is 0")
    if opponent.warmup_limit < 1:
        raise UserError(f"discriminator.warmup_limit must be at least 1, not {opponent.warmup_limit}")
    if losses.class_level and warmup == 0:
        raise UserError(
            "losses.class_mean and class_spread compare with the base generator's images, which the warm-up makes; "
            "add --discriminator.warmup-updates with a number, or --discriminator.warmup-epochs 1"
        )
    if losses.class_queue < 3:
        raise UserError(f"losses.class_queue must be at least 3, not {losses.class_queue}")


def accumulation(config: TrainConfig, processes: int) -> int:
    """Batches per update of each process. UserError where "auto" has no answer."""
    if config.accumulate != "auto":
        return config.accumulate
    together = config.batch_size * processes
    if PAPER_BATCH % together:
        raise UserError(
            f"accumulate auto: {processes} process(es) with batches of {config.batch_size} cannot make "
            f"{PAPER_BATCH} images; choose another batch_size"
        )
    return PAPER_BATCH // together


def require_networks(config: TrainConfig) -> None:
    """UserError naming the option whose directory is missing or incomplete; nothing is loaded."""
    for name in networks_needed(config.losses):
        option = f"--networks.{name.replace('_', '-')}"
        require_directory(getattr(config.networks, name), option, *_FILES[name])


def check_networks(config: TrainConfig) -> None:
    """UserError naming the file that is damaged, or does not fit the others. Reads configs and headers alone."""
    from ubgen.diffusion import check_stable_diffusion
    from ubgen.rewards.clip_files import find_clip
    from ubgen.rewards.qalign_weights import check_weight_files

    checks: dict[str, Callable[[Path], object]] = {
        "stable_diffusion": check_stable_diffusion,
        "clip": find_clip,
        "qalign": check_weight_files,
    }
    for name, path in network_paths(config).items():
        checks[name](path)


def network_files(config: TrainConfig) -> dict[str, list[Path]]:
    """The files that this run reads in each network's directory; these may hold the same weights in other formats."""
    from ubgen.diffusion import stable_diffusion_files
    from ubgen.rewards.clip_files import clip_files
    from ubgen.rewards.qalign_weights import qalign_files

    readers = {"stable_diffusion": stable_diffusion_files, "clip": clip_files, "qalign": qalign_files}
    return {name: readers[name](path) for name, path in network_paths(config).items()}


def networks_needed(losses: LossConfig) -> list[str]:
    """The networks that a run with these losses reads."""
    needed = {
        "stable_diffusion": True,
        "clip": losses.entire > 0 or losses.individual > 0 or losses.class_level or losses.log_unused,
        "qalign": losses.quality > 0 or losses.log_unused,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def network_paths(config: TrainConfig) -> dict[str, Path]:
    """The directories of the networks that this run reads."""
    return {name: resolve_path(getattr(config.networks, name)) for name in networks_needed(config.losses)}


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number that is given, with its option's name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield prefix + name, number
