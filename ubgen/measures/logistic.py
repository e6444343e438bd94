"""Multinomial logistic regression with an L2 penalty, for one set of samples and many C.

Minimised is C * sum_i CE(W x_i + b, y_i) + 0.5 * ||W||^2; the intercept b is not penalised. Of two classes, as in
scikit-learn, the penalty is that of the one vector w_1 - w_0.

- Features come centred and rotated to the eigenbasis of their covariance. That changes neither objective nor optimum,
  and makes a good preconditioner diagonal: C N s_k lambda_j + 1, with s_k the mean of p (1 - p) of class k.
  With fewer samples than dimensions there are only as many columns as samples.
- L-BFGS from there. A step is one product with the features for its direction and one for the gradient; the line
  search works on the margins, the logits less that of the true class, and needs none. Steps keep the sum over classes
  at zero, where the optimum is.
- A fit for another C starts at the best point of the affine hull of the nearest solutions, found on their margins.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from ubgen.core.errors import warn

_HISTORY, _NEAREST = 10, 5
_KEPT = 2 << 30  # bytes of margins of earlier solutions
_PATIENCE = 60  # steps without progress: the limit of float32 is reached


def rotated(parts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, centred, in an orthonormal basis of the space that they span: (N, R), the basis (D, R), the mean."""
    count, dim = sum(map(len, parts)), parts[0].shape[1]
    mean = sum(torch.from_numpy(part).to(device).double().sum(0) for part in parts) / count
    mean = torch.as_tensor(mean, device=device).float()
    if count < dim:
        centred = torch.cat([torch.from_numpy(part).to(device) - mean for part in parts])
        span, triangle = torch.linalg.qr(centred.T)
        _, vectors = torch.linalg.eigh(triangle.double() @ triangle.double().T)
        vectors = vectors.flip(1).float()
        return triangle.T @ vectors, span @ vectors, mean
    gram = torch.zeros(dim, dim, device=device)
    for rows in _chunks(parts, device):
        rows -= mean
        gram += rows.T @ rows
    basis = torch.linalg.eigh(gram.double())[1].flip(1).float()
    rotated = torch.empty(count, dim, device=device)
    done = 0
    for rows in _chunks(parts, device):
        torch.mm(rows - mean, basis, out=rotated[done : done + len(rows)])
        done += len(rows)
    return rotated, basis, mean


def _chunks(parts: Sequence[np.ndarray], device: torch.device, rows: int = 8192) -> Iterator[Tensor]:
    for part in parts:
        for i in range(0, len(part), rows):
            yield torch.from_numpy(part[i : i + rows]).to(device, copy=True)


def forward(rotated: Tensor, point: Tensor) -> Tensor:
    """Logits (N, K) of a point (K, R + 1): weights, and the intercept as the last column."""
    return torch.addmm(point[:, -1], rotated, point[:, :-1].T)


@dataclass
class Solver:
    """Solutions for one set of samples and any number of C."""

    features: Tensor
    """(N, R), uncorrelated columns."""
    labels: Tensor
    """(N,) in 0..K-1."""
    classes: int
    solved: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)
    """C, point, margins."""

    def __post_init__(self) -> None:
        self.labels = torch.as_tensor(self.labels).to(self.features.device)
        self.rows = torch.arange(len(self.labels), device=self.features.device)
        ones = torch.ones(1, device=self.features.device)
        self.variances = torch.cat([self.features.square().mean(0), ones])
        self.penalised = torch.ones_like(self.variances)
        self.penalised[-1] = 0

    def _margins(self, point: Tensor) -> Tensor:
        """(N, K) logits less the true class's, whose column is zero: of a sure sample its rounding would hide them."""
        logits = forward(self.features, point)
        return logits.sub_(logits[self.rows, self.labels][:, None])

    def fit(self, C: float, tolerance: float, max_iter: int) -> tuple[Tensor, int]:
        """`solve` from nothing: by smaller C, since a start from zero would go astray where C is large."""
        first = 100 * self.classes / (len(self.labels) * max(float(self.variances[:-1].max()), 1e-30))
        stops = math.ceil(math.log10(C / first)) if first < C else 0
        for i in range(stops, 0, -1):
            self.solve(C / 10.0**i, 0.1, max_iter)
        return self.solve(C, tolerance, max_iter)

    def nearest(self, C: float) -> list[tuple[float, Tensor, Tensor]]:
        """Solutions for the nearest C."""
        return sorted(self.solved, key=lambda known: abs(math.log(known[0] / C)))[:_NEAREST]

    def solve(self, C: float, tolerance: float, max_iter: int) -> tuple[Tensor, int]:
        """The point (K, R + 1) where the preconditioned gradient is below `tolerance` times the point; steps taken."""
        scale = C * len(self.labels) * (0.5 if self.classes == 2 else 1.0)  # see the module's docstring
        point, margins = self._start(C, scale)
        pairs = deque[tuple[Tensor, Tensor]](maxlen=_HISTORY)
        before: Tensor | None = None
        step = torch.empty(0)
        best, waited, last = math.inf, 0, False
        for count in range(max_iter + 1):  # noqa: B007
            gradient, curvature = self._slopes(margins, scale)
            gradient += self.penalised * point
            diagonal = (scale * curvature[:, None] * self.variances + self.penalised).clamp_(min=1e-6)
            if before is not None and float((difference := gradient - before).mul(step).sum()) > 0:
                pairs.append((step, difference))
            before = gradient
            size = float((point.square() * diagonal).sum().sqrt())
            error = float((gradient.square() / diagonal).sum().sqrt()) / max(size, 1e-30)
            best, waited = (error, 0) if error < 0.9 * best else (best, waited + 1)
            if error <= tolerance or float(gradient.abs().max()) < 1e-12 or waited > _PATIENCE:
                break
            direction = -_two_loops(gradient, diagonal, pairs)
            direction -= direction.mean(0)
            change = self._margins(direction)
            length = self._line(margins, change, point, direction, scale)
            if length == 0.0:
                if not pairs or last:
                    break
                pairs.clear()
                before, last = None, True
                continue
            step, last = length * direction, False
            point, margins = point + step, margins + length * change
        if error > 10 * tolerance:
            warn(f"linear probe with C = {C:g}: not converged after {count} steps (at {error:.1e})")
        self._keep(C, point, margins)
        return point, count

    def _keep(self, C: float, point: Tensor, margins: Tensor) -> None:
        self.solved.append((C, point, margins))
        while len(self.solved) > 1 and len(self.solved) * margins.nbytes > _KEPT:
            self.solved.pop(0)

    def _slopes(self, margins: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """scale * the gradient of the mean cross-entropy, (K, R + 1), and the mean of p (1 - p) of each class.

        The residual of the true class, p - 1, is summed from the others: of a sure sample it would be lost in rounding.
        """
        p = torch.softmax(margins, 1)
        true = p[self.rows, self.labels]
        p[self.rows, self.labels] = 0
        rest = p.sum(1)
        curvature = p.sum(0) - p.square().sum(0)
        curvature.index_add_(0, self.labels, true * rest)
        p[self.rows, self.labels] = -rest
        count = len(self.labels)
        ce = torch.cat([p.T @ self.features, p.sum(0, dtype=torch.float64).float()[:, None]], 1)
        return ce.mul_(scale / count), curvature / count

    def _line(self, margins: Tensor, change: Tensor, point: Tensor, direction: Tensor, scale: float) -> float:
        """Where along the direction the slope has fallen to a fifth: by Newton, within a bracket. 0: nowhere."""
        weights, along = point * self.penalised, direction * self.penalised
        first, second = _dot(weights, along), _dot(along, along)

        def slope(t: float) -> tuple[float, float]:
            weighted = torch.softmax(margins + t * change, 1).mul_(change)
            mean = weighted.sum(1)
            g = scale * float(mean.double().mean()) + first + t * second
            return g, scale * float((weighted.mul_(change).sum(1) - mean.square()).double().mean()) + second

        start, _ = slope(0.0)
        if start >= 0:
            return 0.0
        low, high, t = 0.0, math.inf, 1.0
        for _ in range(20):
            g, h = slope(t)
            if abs(g) <= 0.2 * abs(start):
                return t
            low, high = (low, t) if g > 0 or math.isnan(g) else (t, high)
            newton = t - g / h if h > 0 else math.nan
            if math.isinf(high):
                t = min(max(newton, 1.2 * t), 4 * t) if h > 0 else 4 * t
            elif low + 0.05 * (high - low) < newton < high - 0.05 * (high - low):
                t = newton
            else:
                t = (low + high) / 2 if low > 0 else high / 5
        return low

    def _start(self, C: float, scale: float) -> tuple[Tensor, Tensor]:
        """The best point in the affine hull of zero and the nearest solutions."""
        near = self.nearest(C)
        if not near:
            device = self.features.device
            empty = torch.zeros(self.classes, len(self.variances), device=device)
            return empty, torch.zeros(len(self.labels), self.classes, device=device)
        _, point, margins = near[0]
        directions = [point, *(other - point for _, other, _ in near[1:])]
        changes = [margins, *(other - margins for _, _, other in near[1:])]
        for amount, direction, change in zip(
            self._within(margins, changes, point, directions, scale), directions, changes, strict=True
        ):
            point, margins = point + amount * direction, margins + amount * change
        return point, margins

    def _within(
        self, margins: Tensor, changes: list[Tensor], point: Tensor, directions: list[Tensor], scale: float
    ) -> list[float]:
        """The amounts of the directions that minimise the objective, by a damped Newton method."""
        weights = [d * self.penalised for d in directions]
        first = np.array([_dot(point * self.penalised, w) for w in weights])
        second = np.array([[_dot(a, b) for a in weights] for b in weights])

        def moved(t: np.ndarray) -> tuple[Tensor, float]:
            total = margins.clone()
            for amount, change in zip(t.tolist(), changes, strict=True):
                total.add_(change, alpha=amount)
            odds = total.clamp(max=80).exp_()
            odds[self.rows, self.labels] = 0
            loss = float(torch.log1p(odds.sum(1)).double().mean())
            return total, scale * loss + float(first @ t + 0.5 * t @ second @ t)

        t = np.zeros(len(directions))
        total, value = moved(t)
        for _ in range(8):
            p = torch.softmax(total, 1)
            weighted = [p * change for change in changes]
            means = [w.sum(1) for w in weighted]
            g = scale * np.array([float(m.double().mean()) for m in means]) + first + second @ t
            h = np.empty_like(second)
            for i, j in combinations_with_replacement(range(len(t)), 2):
                both = _dot(weighted[i], changes[j]) - _dot(means[i], means[j])
                h[i, j] = h[j, i] = scale * both / len(self.labels) + second[i, j]
            values, vectors = np.linalg.eigh(h)
            direction = -vectors @ ((vectors.T @ g) / values.clip(min=1e-7 * max(values.max(), 1e-30)))
            decrease, length = float(-g @ direction), 1.0
            if decrease <= 1e-6 * abs(value):
                break
            while length > 1e-3:
                there, lower = moved(t + length * direction)
                if lower <= value - 0.1 * length * decrease:
                    t, total, value = t + length * direction, there, lower
                    break
                length /= 2
            else:
                break
        return t.tolist()


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _two_loops(gradient: Tensor, diagonal: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The L-BFGS inverse Hessian times the gradient, from the preconditioner as the first guess (Nocedal 1980)."""
    q, amounts = gradient.clone(), []
    for s, y in reversed(pairs):
        amounts.append(float((s * q).sum() / (s * y).sum()))
        q -= amounts[-1] * y
    q /= diagonal
    if pairs:
        s, y = pairs[-1]
        q *= float((s * y).sum() / (y.square() / diagonal).sum())
    for (s, y), amount in zip(pairs, reversed(amounts), strict=True):
        q += (amount - float((y * q).sum() / (s * y).sum())) * s
    return q
