"""One update of each player."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ubgen.diffusion import decode, rollout, sample, without_lora
from ubgen.rewards import (
    LossWeights,
    discriminator_loss,
    entire_alignment_loss,
    generator_loss,
    individual_alignment_loss,
    quality_loss,
)
from ubgen.train.batches import Batch
from ubgen.train.config import TrainConfig
from ubgen.train.state import Adversary, TrainState

Metrics = dict[str, float]
UNSCALED = torch.amp.GradScaler(enabled=False)  # the discriminator computes in float32 throughout
RETRIES = 5  # of an update whose gradient overflowed float16, each at half the loss scale


class Diverged(Exception):
    """A loss or a gradient is not finite; the weights have not been touched. The message names it."""


def generator_update(
    state: TrainState, config: TrainConfig, batches: Sequence[Batch]
) -> tuple[Tensor | None, Metrics]:
    """Eq. 8 back through the sampler into the LoRA, the mean over `batches` of the gradients.

    Returns the images' CLIP features, detached, and metrics. Where the gradient overflows float16, the weights stay and
    the same update is done again at half the loss scale. Diverged when it is not finite for another reason.
    """
    overflows, norm = 0, math.inf
    while not math.isfinite(norm):
        scale = state.scaler.get_scale()
        features, means = _gradients(state, config, batches)
        norm = _step(state.lora, state.generator_optimizer, config.generator.clip, state.scaler)
        overflows += not math.isfinite(norm)
        if overflows > RETRIES:
            raise Diverged(f"the gradient norm is {norm} at every loss scale down to {scale:g}")
    means["generator_grad_norm"] = norm
    if state.scaler.is_enabled():
        means |= {"loss_scale": scale, "overflows": float(overflows)}
    return features, means


def _gradients(
    state: TrainState, config: TrainConfig, batches: Sequence[Batch]
) -> tuple[Tensor | None, Metrics]:
    """Adds up in the LoRA the gradient of each batch's loss over their number; metrics are means, too.

    As many processes with a batch each do the same, to rounding.
    """
    weights = LossWeights(**{term.name: getattr(config.losses, term.name) for term in fields(LossWeights)})
    rows, seen = list[dict[str, Tensor]](), list[Tensor]()
    for batch in batches:
        images, distance = _rollout_images(state, config, batch)
        features = _clip_features(state, config, images)
        terms, metrics = _reward_terms(state, config, batch, images, features)
        metrics["base_distance"] = distance.detach()
        if weights.trust > 0:
            terms["trust"] = distance
        loss = generator_loss(terms, weights)
        state.scaler.scale(loss / len(batches)).backward(inputs=state.lora)
        rows.append({"loss": loss.detach(), **metrics})
        seen += [] if features is None else [features.detach()]
    means = _mean_over_processes(_mean_over_batches(rows))
    _require_finite_loss(means)
    return torch.cat(seen) if seen else None, means


def discriminator_update(
    adversary: Adversary, config: TrainConfig, features_BD: Tensor, negatives_B: Tensor
) -> Metrics:
    """Eq. 5 from the other side, on the same images: `features_BD` are theirs, detached."""
    network, texts = adversary.network, adversary.class_text_ND[negatives_B.to(features_BD.device)]
    loss = discriminator_loss(network, features_BD, texts)
    accuracy = _accuracy(network, features_BD, texts)  # before it is trained on them
    means = _mean_over_processes({"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy})
    if not math.isfinite(means["discriminator_loss"]):
        raise Diverged(f"discriminator_loss is {means['discriminator_loss']}")
    means |= _health(adversary, features_BD, means["discriminator_accuracy"])
    loss.backward()
    parameters = list(network.parameters())
    norm = _step(parameters, adversary.optimizer, config.discriminator.clip, UNSCALED)
    return {**means, "discriminator_grad_norm": norm}


def _health(adversary: Adversary, images_BD: Tensor, accuracy: float) -> Metrics:
    """What says whether the discriminator has learned anything: see DiscriminatorHealth."""
    health, size = adversary.health, torch.tensor(float(len(images_BD)), device=images_BD.device)
    health.judged(accuracy, int(reduce(size, "sum")))
    turned = reduce(torch.stack(health.directions(adversary.network, images_BD)), "mean")
    cosine = torch.cosine_similarity(turned[0], turned[1], dim=0)
    return {
        "discriminator_held_back_accuracy": health.accuracy(),
        "discriminator_cosine_with_start": float(cosine),
    }


@torch.no_grad()
def warmup_features(
    state: TrainState, config: TrainConfig, batches: Sequence[Batch]
) -> tuple[Tensor, Metrics]:
    """CLIP features of images by the generator as it stands, without any gradient; and how well they fit."""
    features, rows = zip(*(_warmup_features(state, config, batch) for batch in batches), strict=True)
    return torch.cat(features), _mean_over_processes(_mean_over_batches(rows))


def _warmup_features(
    state: TrainState, config: TrainConfig, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    assert state.clip is not None  # the caller has what judges CLIP's features
    settings = config.rollout
    with state.autocast():
        latents = sample(
            state.sd.unet,
            *_sampler_inputs(state, batch),
            steps=settings.steps,
            guidance=settings.guidance,
            step_noise=batch.step_noise,
        )
    features = _encode_image(state, config, _decode(state, config, latents))
    individual = individual_alignment_loss(features, _descriptions(state, batch))
    return features, {"clip_similarity": 1 - individual}


def _sampler_inputs(state: TrainState, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Scheduler, starting latents, prompts and the empty prompt."""
    prompts_BSD = state.prompts_NSD[batch.classes_B.to(state.device)]
    return state.scheduler, batch.latents.to(state.device), prompts_BSD, state.uncond_1SD


class _Compared:
    """The tuned UNet. At its call number `at` it also measures how far its noise is from the base UNet's."""

    def __init__(self, unet: Any, at: int) -> None:
        self._unet, self._at, self._calls = unet, at, 0
        self.distance = torch.tensor(math.nan)

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        noise: Tensor = self._unet(latents, timestep, context).sample
        if self._calls == self._at:
            with torch.no_grad(), without_lora(self._unet):
                base = self._unet(latents, timestep, context).sample
            self.distance = (noise.float() - base.float()).square().mean()
        self._calls += 1
        return noise


def _rollout_images(state: TrainState, config: TrainConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images, and the mean squared distance of tuned and base noise on their latents, at one of the trained steps."""
    settings, unet = config.rollout, _Compared(state.sd.unet, batch.compared_step)
    with state.autocast():
        latents = rollout(
            unet,
            *_sampler_inputs(state, batch),
            steps=settings.steps,
            guidance=settings.guidance,
            grad_steps=batch.grad_steps,
            step_noise=batch.step_noise,
            detach_unet_input=settings.detach_unet_input,
        )
    return _decode(state, config, latents), unet.distance


def _decode(state: TrainState, config: TrainConfig, latents_BChw: Tensor) -> Tensor:
    size, recompute = _score_batch(state, config), config.rollout.gradient_checkpointing
    return in_parts(lambda part: decode(state.sd.vae, part), latents_BChw, size, recompute)


def _encode_image(state: TrainState, config: TrainConfig, images_B3HW: Tensor) -> Tensor:
    assert state.clip is not None
    return in_parts(state.clip.encode_image, images_B3HW, _score_batch(state, config)).float()


def _score_batch(state: TrainState, config: TrainConfig) -> int | None:
    """Images to decode and encode at a time; None for all."""
    return config.rollout.score_batch or (1 if state.device.type == "cuda" else None)


def in_parts(
    network: Callable[[Tensor], Tensor], x_B: Tensor, size: int | None, recompute: bool = False
) -> Tensor:
    """`network` on `size` rows at a time, or on all of them for None.

    The backward pass computes each part again before it goes through it, so that no more than one part's activations
    are in memory; a single part only where `recompute` asks for it.
    """
    parts = x_B.split(size or len(x_B))
    if torch.is_grad_enabled() and x_B.requires_grad and (recompute or len(parts) > 1):
        return torch.cat([checkpoint(network, part, use_reentrant=False) for part in parts])
    return torch.cat([network(part) for part in parts])


def _clip_features(state: TrainState, config: TrainConfig, images_B3HW: Tensor) -> Tensor | None:
    if state.clip is None:
        return None
    losses = config.losses
    with torch.set_grad_enabled(losses.entire > 0 or losses.individual > 0 or losses.class_level):
        return _encode_image(state, config, images_B3HW)


def _descriptions(state: TrainState, batch: Batch) -> Tensor:
    assert state.descriptions_ND is not None  # where there are features, CLIP is there
    return state.descriptions_ND[batch.classes_B.to(state.device)]


def _reward_terms(
    state: TrainState, config: TrainConfig, batch: Batch, images: Tensor, features: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of Eq. 8 that are switched on, and everything that was measured, detached."""
    losses, terms = config.losses, {}
    metrics: dict[str, Tensor] = {}
    if features is not None:
        individual = individual_alignment_loss(features, _descriptions(state, batch))
        metrics |= {"loss_individual": individual.detach(), "clip_similarity": 1 - individual.detach()}
        if losses.individual > 0:
            terms["individual"] = individual
    if state.adversary is not None and features is not None:
        names = state.adversary.class_text_ND[batch.negatives_B.to(state.device)]
        terms["entire"] = entire_alignment_loss(state.adversary.network, features, names, losses.gan)
        metrics["loss_entire"] = terms["entire"].detach()
    if state.class_moments is not None and features is not None:
        mean, spread = state.class_moments.losses(features, batch.classes_B)
        terms |= {"class_mean": mean, "class_spread": spread}
        metrics |= {"loss_class_mean": mean.detach(), "loss_class_spread": spread.detach()}
    if state.qalign is not None:
        with torch.set_grad_enabled(losses.quality > 0):
            scores = state.qalign.score(images, checkpoint=config.rollout.gradient_checkpointing)
            quality = quality_loss(scores)
        metrics |= {"loss_quality": quality.detach(), "quality": scores.detach().mean()}
        if losses.quality > 0:
            terms["quality"] = quality
    return terms, metrics


@torch.no_grad()
def _accuracy(discriminator: nn.Module, images_BD: Tensor, texts_BD: Tensor) -> Tensor:
    """Share of images called image and of texts called text."""
    return ((discriminator(images_BD) > 0).float().mean() + (discriminator(texts_BD) < 0).float().mean()) / 2


def _step(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip: float,
    scaler: torch.amp.GradScaler,
) -> float:
    """Average the gradients over the processes, clip, step, clear. Returns the norm before clipping.

    Without loss scaling a gradient that is not finite raises Diverged; with it, the scaler skips the step and
    halves its scale.
    """
    _average_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise Diverged(f"the gradient norm is {norm}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """One reduction for all parameters; every process ends with the same bits."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _mean_over_processes(values: dict[str, Tensor]) -> Metrics:
    means = reduce(torch.stack([value.float() for value in values.values()]), "mean").tolist()
    return dict(zip(values, means, strict=True))


def _mean_over_batches(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def _require_finite_loss(metrics: Metrics) -> None:
    """What is only logged may be anything: a network may overflow whose score no loss uses."""
    if math.isfinite(metrics["loss"]):
        return
    terms = [name for name in metrics if name.startswith("loss_")]
    culprit = next((name for name in terms if not math.isfinite(metrics[name])), "loss")
    raise Diverged(f"{culprit} is {metrics[culprit]}")
