"""The class-level terms: what an image shows beside its class should not depend on the class.

These two terms are ours, not the paper's. Its discriminator (Eq. 5) sees the images of all classes together, so
exchanging what goes with one class for what goes with another costs it nothing. Its individual term (Eq. 6) is flat
over what an image shows beside its class. Between the two lies what the class-level terms ask for:

    p(residual | class) = p_base(residual)

A residual is an image's unit CLIP feature, less the base generator's mean and less the part along the class texts, on
the main directions in which the base generator's images of one class differ. What differs within a class is beside the
class; in other directions images of a class agree because they show the class. (On the miniature's worlds the class
explains 0.03 of a fair world's residuals on these directions, and 0.63 of a biased one's. On the main directions of all
residuals it would be 0.13 and 0.68: there the terms would work against the class itself.)

Within every class residuals should have the mean and the variance that the base generator's have over all classes.
Equal means are independence, as far as a mean can tell; equal variances keep the variety. What the base generator never
varies within a class the terms cannot see.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TEXT_SHARE = 4
"""The texts take at most a quarter of the feature's width; 1,000 classes would span all of it and leave no residual."""


def class_mean_loss(residuals_BnK: Tensor, variance_K: Tensor) -> Tensor:
    """Mean over images and directions of m^2 / lambda - 1 / n, (B,) per image: how far a class's mean lies off.

    `residuals_BnK`: for each image the last n residuals of its class, its own among them; `variance_K`: lambda, the
    base generator's variances over all classes. 1 / n is what chance gives m^2 / lambda for n independent residuals, so
    the expectation is 0 where the class has no part in them. No gradient reaches 1 / n.
    """
    mean = residuals_BnK.mean(dim=1)
    return (mean.square() / variance_K).mean(dim=1) - 1 / residuals_BnK.shape[1]


def class_spread_loss(residuals_BnK: Tensor, variance_K: Tensor) -> Tensor:
    """Mean over directions of max(0, 1 - v / lambda), (B,) per image: the variance that a class lacks.

    Shapes as in `class_mean_loss`; v is the unbiased variance of the n residuals. It scatters, and max() keeps one side
    of that: for normal residuals of the right variance and n = 24 the expectation is 0.12, not 0.
    """
    missing = 1 - residuals_BnK.var(dim=1, correction=1) / variance_K
    return missing.clamp(min=0).mean(dim=1)


class ClassMoments:
    """The base generator's residuals over all classes, and for each class a queue of its last residuals.

    First `collect` images of the base generator, then `fit` once. From then on `losses` compares, and `push` moves the
    queues on. The texts' part, the directions and lambda stay as fitted: a generator that moves as a whole is seen.
    """

    def __init__(self, texts_ND: Tensor, queue: int = 24, directions: int = 8) -> None:
        """`texts_ND`: CLIP features of the class texts. `queue`: n, an image's own residual included. `directions`: the
        largest K."""
        self._classes, self._past, self._directions = len(texts_ND), queue - 1, directions
        self._text_basis = _main_directions(
            F.normalize(texts_ND.float(), dim=1), texts_ND.shape[1] // TEXT_SHARE
        )
        self._pool = torch.empty(0, texts_ND.shape[1], device=texts_ND.device)
        self._pool_classes = torch.empty(0, dtype=torch.int64, device=texts_ND.device)
        self._fitted: dict[str, Tensor] = {}

    def collect(self, features_BD: Tensor, classes_B: Tensor) -> None:
        """CLIP features of images by the base generator, and their class indices."""
        self._pool = torch.cat([self._pool, F.normalize(features_BD.detach().float(), dim=1)])
        self._pool_classes = torch.cat([self._pool_classes, classes_B.to(self._pool_classes)])

    @torch.no_grad()
    def fit(self) -> None:
        """Mean, directions and variances of the pool; the queues begin with each class's last images of it."""
        mean = self._pool.mean(dim=0)
        centred = self._pool - mean
        centred = centred - centred @ self._text_basis @ self._text_basis.T
        classes = self._pool_classes
        sums = centred.new_zeros(self._classes, centred.shape[1]).index_add(0, classes, centred)
        counts = torch.bincount(classes, minlength=self._classes).clamp(min=1)[:, None]
        within = centred - (sums / counts)[classes]
        basis = _main_directions(within, self._directions)
        residuals = centred @ basis
        self._fitted = {
            "mean": mean,
            "basis": basis,
            "variance": residuals.var(dim=0, correction=1),
            "held": residuals.square().sum() / centred.square().sum(),
            "queue": residuals.new_zeros(self._classes, self._past, residuals.shape[1]),
            "count": classes.new_zeros(self._classes),
        }
        self._enqueue(residuals, classes)
        self._pool, self._pool_classes = self._pool[:0], self._pool_classes[:0]

    @property
    def fitted(self) -> bool:
        return bool(self._fitted)

    @property
    def held(self) -> float:
        """Share of the variance of the base generator's residuals that the directions hold."""
        return float(self._fitted["held"])

    def residuals(self, features_BD: Tensor) -> Tensor:
        """CLIP features (B, D) -> residuals along the directions (B, K). Differentiable."""
        # the directions have no part along the texts, so projecting on them takes the texts' part away
        return (F.normalize(features_BD.float(), dim=1) - self._fitted["mean"]) @ self._fitted["basis"]

    def losses(self, features_BD: Tensor, classes_B: Tensor) -> tuple[Tensor, Tensor]:
        """L_mean and L_spread of a batch: scalars to minimise, means over its images.

        An image enters as the last of its class's queue, so images do not see each other and a batch may be taken in
        parts. Its gradient is n times what the moments of n residuals give, as if the others moved with it. An image
        whose class has not filled its queue counts as 0.
        """
        fitted, n = self._fitted, self._past + 1
        own = self.residuals(features_BD)
        own = own.detach() + n * (own - own.detach())
        classes_B = classes_B.to(fitted["count"].device)
        joined = torch.cat([fitted["queue"][classes_B], own[:, None]], dim=1)
        full = (fitted["count"][classes_B] >= self._past).float()
        mean = class_mean_loss(joined, fitted["variance"])
        spread = class_spread_loss(joined, fitted["variance"])
        return (full * mean).mean(), (full * spread).mean()

    @torch.no_grad()
    def push(self, features_BD: Tensor, classes_B: Tensor) -> None:
        """These images are now the last of their classes; all processes push the same, in the same order."""
        self._enqueue(self.residuals(features_BD), classes_B.to(self._fitted["count"]))

    def _enqueue(self, residuals_BK: Tensor, classes_B: Tensor) -> None:
        queue, count = self._fitted["queue"], self._fitted["count"]
        for residual, label in zip(residuals_BK, classes_B.tolist(), strict=True):
            queue[label, int(count[label]) % self._past] = residual
            count[label] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self._pool, "pool_classes": self._pool_classes, "fitted": self._fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pool = state["pool"].to(self._pool)
        self._pool_classes = state["pool_classes"].to(self._pool_classes)
        self._fitted = {name: tensor.to(self._pool.device) for name, tensor in state["fitted"].items()}


def _main_directions(rows_ND: Tensor, most: int) -> Tensor:
    """(D, K) orthonormal: the main directions of the rows about their mean, at most `most`, no empty ones."""
    rows = rows_ND.double().cpu()  # the same on every device
    _, sizes, basis = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    kept = int((sizes > 1e-2 * sizes.max()).sum())  # m^2 / lambda would amplify rounding in the others
    return basis[: min(most, kept)].T.to(rows_ND)
