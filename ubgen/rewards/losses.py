"""The losses of "Unbiased General Annotated Dataset Generation", Eq. 5 to 8, and the draw of Eq. 5's texts.

All are float32 means over the batch. The discriminator's logit is positive for images (label 1) and negative
for texts (label 0), as in the authors' released code. Eq. 5's D is the probability of "text", so D(f) =
sigmoid(-logit(f)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ubgen.core.classes import compared
from ubgen.core.errors import UserError

GanLoss = Literal["nonsaturating", "saturating"]
Logits = Callable[[Tensor], Tensor]  # (B, D) features -> (B, 1) logits; a Discriminator


def draw_negatives(
    class_idx: Tensor, names: Sequence[str], generator: torch.Generator | None = None
) -> Tensor:
    """For each image a class to show the discriminator: uniform over all classes of another name.

    `class_idx` (B,) int64 are the images' classes, indices into `names`; the result (B,) int64 too, on the
    same device. `generator` is a CPU generator. Names are compared, not indices, because two classes may
    share a name (ImageNet has two cranes), and as CLIP reads them: without regard to case and spacing. The
    text of Eq. 5.

    We differ from the released code in drawing from all classes; it permutes the first B, own class included.
    UserError when no class has another name.
    """
    first: dict[str, int] = {}
    name_id = torch.tensor([first.setdefault(compared(name), i) for i, name in enumerate(names)])
    own = class_idx.detach().cpu()
    allowed = name_id[None, :] != name_id[own][:, None]
    if not bool(allowed.any(dim=1).all()):
        raise UserError(
            "the class list has a single class name: the entire alignment loss needs at least two"
        )
    return torch.multinomial(allowed.double(), 1, generator=generator)[:, 0].to(class_idx.device)


def entire_alignment_loss(
    discriminator: Logits,
    image_features: Tensor,
    text_features: Tensor | None = None,
    gan_loss: GanLoss = "nonsaturating",
) -> Tensor:
    """Eq. 5, the generator's side: make the images' features look like class names to the discriminator.

    `image_features` (B, D) and `text_features` (B, D): CLIP features of the images and of the class names
    that `draw_negatives` chose, not L2-normalised. Returns a scalar to minimise.

    "saturating" is Eq. 5 literally, mean of log D(text) + log(1 - D(image)); it needs `text_features`.
    "nonsaturating" (default, the released code) is the mean of -log D(image): the same direction, with a
    gradient that does not vanish while the discriminator wins. The texts have no part in it.
    """
    image_logits = discriminator(image_features).float()
    if gan_loss == "nonsaturating":
        return F.softplus(image_logits).mean()
    if gan_loss != "saturating":
        raise ValueError(f"gan_loss must be 'nonsaturating' or 'saturating', not {gan_loss!r}")
    if text_features is None:
        raise ValueError("the saturating loss needs text_features")
    return -F.softplus(discriminator(text_features).float()).mean() - F.softplus(-image_logits).mean()


def discriminator_loss(discriminator: Logits, image_features: Tensor, text_features: Tensor) -> Tensor:
    """Eq. 5, the discriminator's side: binary cross-entropy, image = 1 and text = 0; a scalar to minimise.

    `image_features` (B, D), detached by the caller, and `text_features` (B', D) as in
    `entire_alignment_loss`. It is -1/2 of Eq. 5: we take the mean of the two halves instead of their sum, as
    the released code does, which matters to gradient clipping only.
    """
    on_images = F.softplus(-discriminator(image_features).float()).mean()
    on_texts = F.softplus(discriminator(text_features).float()).mean()
    return (on_images + on_texts) / 2


def individual_alignment_loss(
    image_features: Tensor, text_features: Tensor, pairs: Literal["matching", "matrix"] = "matching"
) -> Tensor:
    """Eq. 6: 1 - cosine of each image with its description "photo of <class>"; a scalar to minimise, 0 to 2.

    `image_features` (B, D) and `text_features` (B, D): CLIP features, row i of the one belonging to row i of
    the other; normalised here. pairs="matrix" averages over all B x B pairs, as the released code does (and
    only logs).
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    if pairs == "matching":
        return 1 - (images * texts).sum(dim=-1).mean()
    return 1 - (images @ texts.T).mean()


def quality_loss(scores: Tensor) -> Tensor:
    """Eq. 7: 1 - Q / 5, with `scores` (B,) of Q-Align in [1, 5]. A scalar to minimise, 0 (best) to 0.8."""
    return 1 - scores.float().mean() / 5


@dataclass(frozen=True)
class LossWeights:
    """Weights of Eq. 8's terms, the paper's by default (lambda_1 = 0.1), and of ours, off by default. 0 is off."""

    entire: float = 1.0
    individual: float = 1.0
    quality: float = 0.1
    class_mean: float = 0.0
    class_spread: float = 0.0
    trust: float = 0.0


def generator_loss(terms: dict[str, Tensor], weights: LossWeights = LossWeights()) -> Tensor:
    """Eq. 8: L = L_en + L_in + lambda * L_q, over those of the terms given, each named as its weight; and ours.

    A missing term counts as 0, so a switched-off loss need not be computed. ValueError when none is given.
    """
    if not terms:
        raise ValueError("every loss weight is 0: there is nothing to train on")
    weighted = [getattr(weights, name) * term for name, term in terms.items()]
    return torch.stack(weighted).sum()
