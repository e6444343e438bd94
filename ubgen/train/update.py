"""One update of each player."""

import math
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from ubgen.diffusion import decode, rollout, sample
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


class Diverged(Exception):
    """A loss or a gradient is not finite; the weights have not been touched. The message names it."""


def generator_update(state: TrainState, config: TrainConfig, batch: Batch) -> tuple[Tensor | None, Metrics]:
    """Eq. 8 back through the sampler into the LoRA. Returns the images' CLIP features, detached, and metrics."""
    images = _rollout_images(state, config, batch)
    features = _clip_features(state, config, images)
    terms, metrics = _reward_terms(state, config, batch, images, features)
    losses = config.losses
    entire = losses.entire if state.rise is None else losses.entire * state.rise.share()
    weights = LossWeights(entire, losses.individual, losses.quality)
    loss = generator_loss(terms, weights)
    means = _mean_over_processes({"loss": loss.detach(), **metrics})
    _require_finite(means)
    if state.rise is not None:
        state.rise.observe(means["clip_similarity"])
    state.scaler.scale(loss).backward(inputs=state.lora)
    means["generator_grad_norm"] = _step(
        state.lora, state.generator_optimizer, config.generator.clip, state.scaler
    )
    if "entire" in terms:
        means["weight_entire"] = entire
    return None if features is None else features.detach(), means


def discriminator_update(
    adversary: Adversary, config: TrainConfig, features_BD: Tensor, negatives_B: Tensor
) -> Metrics:
    """Eq. 5 from the other side, on the same images: `features_BD` are theirs, detached."""
    network, texts = adversary.network, adversary.class_text_ND[negatives_B.to(features_BD.device)]
    images = adversary.project(features_BD)
    loss = discriminator_loss(network, images, texts)
    accuracy = _accuracy(network, images, texts)
    means = _mean_over_processes({"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy})
    _require_finite(means)
    loss.backward()
    parameters = list(network.parameters())
    norm = _step(parameters, adversary.optimizer, config.discriminator.clip, UNSCALED)
    return {**means, "discriminator_grad_norm": norm}


@torch.no_grad()
def warmup_features(state: TrainState, config: TrainConfig, batch: Batch) -> tuple[Tensor, Metrics]:
    """CLIP features of images by the generator as it stands, without any gradient; and how well they fit."""
    assert state.clip is not None  # the caller has an adversary, which judges CLIP's features
    settings = config.rollout
    with state.autocast():
        latents = sample(
            state.sd.unet,
            *_sampler_inputs(state, batch),
            steps=settings.steps,
            guidance=settings.guidance,
            step_noise=batch.step_noise,
        )
    features = state.clip.encode_image(decode(state.sd.vae, latents)).float()
    individual = individual_alignment_loss(features, _descriptions(state, batch))
    return features, _mean_over_processes({"clip_similarity": 1 - individual})


def _sampler_inputs(state: TrainState, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Scheduler, starting latents, prompts and the empty prompt."""
    prompts_BSD = state.prompts_NSD[batch.classes_B.to(state.device)]
    return state.scheduler, batch.latents.to(state.device), prompts_BSD, state.uncond_1SD


def _rollout_images(state: TrainState, config: TrainConfig, batch: Batch) -> Tensor:
    settings = config.rollout
    with state.autocast():
        latents = rollout(
            state.sd.unet,
            *_sampler_inputs(state, batch),
            steps=settings.steps,
            guidance=settings.guidance,
            grad_steps=batch.grad_steps,
            step_noise=batch.step_noise,
            detach_unet_input=settings.detach_unet_input,
        )
    return decode(state.sd.vae, latents, settings.gradient_checkpointing)


def _clip_features(state: TrainState, config: TrainConfig, images_B3HW: Tensor) -> Tensor | None:
    if state.clip is None:
        return None
    with torch.set_grad_enabled(config.losses.entire > 0 or config.losses.individual > 0):
        return state.clip.encode_image(images_B3HW).float()


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
        terms["entire"] = entire_alignment_loss(
            state.adversary.network, state.adversary.project(features), names, losses.gan
        )
        metrics["loss_entire"] = terms["entire"].detach()
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
    halves its scale, which is given up where it no longer helps.
    """
    _average_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1e-3):
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


def _require_finite(metrics: Metrics) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}")
