"""What the generator is rewarded for: alignment with text in CLIP's space, and image quality by Q-Align."""

from ubgen.rewards.class_moments import ClassMoments, class_mean_loss, class_spread_loss
from ubgen.rewards.clip import Clip
from ubgen.rewards.discriminator import Discriminator
from ubgen.rewards.losses import (
    LossWeights,
    discriminator_loss,
    draw_negatives,
    entire_alignment_loss,
    generator_loss,
    individual_alignment_loss,
    quality_loss,
)
from ubgen.rewards.preprocess import clip_preprocess, pad_to_square, qalign_preprocess
from ubgen.rewards.qalign import QAlign

__all__ = [
    "ClassMoments",
    "Clip",
    "Discriminator",
    "LossWeights",
    "QAlign",
    "class_mean_loss",
    "class_spread_loss",
    "clip_preprocess",
    "discriminator_loss",
    "draw_negatives",
    "entire_alignment_loss",
    "generator_loss",
    "individual_alignment_loss",
    "pad_to_square",
    "qalign_preprocess",
    "quality_loss",
]
