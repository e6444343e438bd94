"""The linear probe: logistic regression with scikit-learn's objective and optimum, and the search for its C."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ubgen.core.errors import UserError
from ubgen.measures.logistic import Solver, forward, rotated

EXACT = 2e-5
"""Tolerance of a fit: coefficients within about 1e-3 of the optimum, relative, over the whole range of C."""
TRIAL = 1e-3
"""Tolerance of a trial, whose validation accuracy alone counts."""
REFIT = 5e-4
"""Tolerance of the fit with the C that a search found: coefficients within about 1 % of the optimum."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier."""

    weight: np.ndarray
    """(K, D) float32."""
    bias: np.ndarray
    """(K,) float32."""
    classes: np.ndarray
    """(K,) the labels, sorted."""
    steps: int = 0
    """Of the optimiser."""

    def logits(self, features: Any) -> np.ndarray:
        """(N, K) float32 of (N, D) features."""
        return _numpy(features) @ self.weight.T + self.bias

    def predict(self, features: Any) -> np.ndarray:
        """(N,) labels."""
        return self.classes[self.logits(features).argmax(1)]


@dataclass(frozen=True)
class ProbeSearch:
    """The best of several C, and what was tried."""

    probe: LinearProbe
    """Fitted to training and validation samples together."""
    C: float
    accuracy: float
    """Of the best trial, on the validation samples, in [0, 1]."""
    trials: tuple[tuple[float, float], ...]
    """(C, validation accuracy) in the order in which they were suggested."""


def fit_linear_probe(
    features: Any, labels: Any, *, C: float, max_iter: int = 2000, device: str = "auto"
) -> LinearProbe:
    """Features (N, D), labels (N,) of any kind that sorts; computed in float32 on `device` ("auto": a GPU if any).

    UserError for features that are not finite, fewer than two classes, or a C that is not positive. A fit that has not
    converged after `max_iter` steps is warned about.
    """
    _require_positive(C)
    x, classes, y = _checked(features, labels, "features")
    samples, basis, mean = rotated([x], _device(device))
    point, steps = Solver(samples, y, len(classes)).fit(C, EXACT, max_iter)
    return _probe(point, basis, mean, classes, steps)


def search_probe(
    train_features: Any,
    train_labels: Any,
    val_features: Any,
    val_labels: Any,
    *,
    trials: int = 30,
    seed: int = 22,
    range_C: tuple[float, float] = (1e-5, 1e6),
    max_iter: int = 2000,
    device: str = "auto",
) -> ProbeSearch:
    """The protocol's search: Optuna's TPE over C, log-uniform, for top-1 on the validation samples; refit on all.

    The first trials, which TPE draws at random, are fitted in the order of C, so that each starts
    from its neighbours.
    UserError as for `fit_linear_probe`, and for a class of the validation samples that has no training sample.
    """
    if trials < 1:
        raise UserError(f"trials must be positive, not {trials}")
    _require_positive(range_C[0])
    x, classes, y = _checked(train_features, train_labels, "training features")
    vx, _, _ = _checked(val_features, val_labels, "validation features", least=1)
    vy = np.asarray(_numpy_labels(val_labels))
    if len(strange := np.setdiff1d(vy, classes)):
        raise UserError(f"class {strange[0].item()!r} has validation samples, but no training sample")
    if x.shape[1] != vx.shape[1]:
        raise UserError(f"training features have {x.shape[1]} columns, validation features {vx.shape[1]}")
    samples, basis, mean = rotated([x, vx], _device(device))
    solver = Solver(samples[: len(x)], y, len(classes))
    held, wanted = samples[len(x) :], torch.from_numpy(np.searchsorted(classes, vy)).to(samples.device)

    def accuracy(C: float) -> float:
        solve = solver.solve if solver.solved else solver.fit
        point, _ = solve(C, TRIAL, max_iter)
        return float((forward(held, point).argmax(1) == wanted).double().mean())

    tried = _by_tpe(accuracy, trials, seed, range_C)
    best, top = max(tried, key=lambda trial: trial[1])
    every = Solver(samples, torch.cat([y, wanted.cpu()]), len(classes))
    point, steps = every.fit(best, REFIT, max_iter)
    return ProbeSearch(_probe(point, basis, mean, classes, steps), best, top, tuple(tried))


def _by_tpe(objective: Any, trials: int, seed: int, bounds: tuple[float, float]) -> list[tuple[float, float]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def asked() -> tuple[Any, float]:
        trial = study.ask()
        return trial, trial.suggest_float("C", *bounds, log=True)

    first = [asked() for _ in range(min(10, trials))]  # TPE's n_startup_trials
    values = {C: objective(C) for C in sorted(C for _, C in first)}
    tried = [(C, values[C]) for _, C in first]
    for trial, C in first:
        study.tell(trial, values[C])
    for _ in range(trials - len(first)):
        trial, C = asked()
        tried.append((C, objective(C)))
        study.tell(trial, tried[-1][1])
    return tried


# --- inputs and outputs


def _require_positive(C: float) -> None:
    if not (math.isfinite(C) and C > 0):
        raise UserError(f"C must be a positive number, not {C}")


def _numpy(features: Any) -> np.ndarray:
    return np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, np.float32)


def _numpy_labels(labels: Any) -> np.ndarray:
    return np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)


def _checked(features: Any, labels: Any, what: str, least: int = 2) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Features, sorted classes, and each sample's position in them."""
    x, labels = _numpy(features), _numpy_labels(labels)
    if x.ndim != 2 or labels.ndim != 1 or len(x) != len(labels):
        raise UserError(f"{what} must be (N, D) with N labels, not {x.shape} with {labels.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(x.sum(1)))) and not np.isfinite(x[bad]).all():
        raise UserError(f"{what}: row {bad[0]} holds NaN or infinity")
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < least:
        raise UserError(f"{what}: samples of at least {least} classes are needed, not {len(classes)}")
    return x, classes, torch.from_numpy(y.astype(np.int64))


def _device(device: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def _probe(point: Tensor, basis: Tensor, mean: Tensor, classes: np.ndarray, steps: int) -> LinearProbe:
    weight = point[:, :-1] @ basis.T
    bias = point[:, -1].double() - weight.double() @ mean.double()
    return LinearProbe(weight.cpu().numpy(), bias.float().cpu().numpy(), classes, steps)
