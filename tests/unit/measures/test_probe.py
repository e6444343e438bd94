"""The linear probe against scikit-learn's LogisticRegression, converged in double precision."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ubgen.core.errors import UserError, Warned
from ubgen.measures import fit_linear_probe
from ubgen.measures.probe import search_probe


def data(count: int, dim: int, classes: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Like pooled features: not negative, not centred, a falling spectrum, norms that differ."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    spectrum = (1 + np.arange(dim)) ** -0.6
    latent = (
        apart * rng.standard_normal((classes, dim))[labels] + rng.standard_normal((count, dim))
    ) * spectrum
    features = np.maximum(latent @ rng.standard_normal((dim, dim)) * 0.5, 0)
    return (features * np.exp(rng.normal(0, 0.3, (count, 1)))).astype(np.float32), labels


def optimum(features: np.ndarray, labels: np.ndarray, C: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the line search, at the limit of double precision
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=2000)
        return model.fit(features.astype(np.float64), labels)


def distance(probe: Any, model: Any) -> float:
    """Of the coefficients, relative; of two classes scikit-learn keeps the difference."""
    weight = probe.weight if len(probe.weight) > 2 else probe.weight[1:] - probe.weight[:1]
    return float(np.linalg.norm(weight - model.coef_) / np.linalg.norm(model.coef_))


@pytest.mark.parametrize("C", [1e-5, 1e-3, 1e-1, 1e1, 1e3, 1e6])
@pytest.mark.parametrize(
    ("count", "dim", "classes", "apart"),
    [(400, 24, 5, 0.5), (400, 24, 5, 4.0), (300, 20, 2, 0.5), (40, 60, 4, 1.0), (9, 30, 3, 1.0)],
    ids=["overlapping", "separable", "two classes", "more dimensions than samples", "three samples a class"],
)
def test_the_optimum_is_scikit_learns(count: int, dim: int, classes: int, apart: float, C: float) -> None:
    features, labels = data(count, dim, classes, apart)
    probe, model = fit_linear_probe(features, labels, C=C), optimum(features, labels, C)
    assert distance(probe, model) < 1e-3
    assert (probe.predict(features) == model.predict(features)).mean() > 0.99
    bias = probe.bias if classes > 2 else probe.bias[1:] - probe.bias[:1]
    shift = (bias - bias.mean()) - (model.intercept_ - model.intercept_.mean())
    assert np.abs(shift).max() < 1e-3 * max(1.0, np.abs(probe.bias).max())


@pytest.mark.slow
@pytest.mark.parametrize("C", [1e-2, 1e1, 1e6])
def test_the_optimum_with_many_classes(C: float) -> None:
    features, labels = data(1200, 128, 60, 0.7)
    model = LogisticRegression(C=C, tol=1e-13, max_iter=100_000).fit(features.astype(np.float64), labels)
    assert distance(fit_linear_probe(features, labels, C=C), model) < 1e-3


def test_odd_columns_and_labels() -> None:
    """A constant column, a copied one, one of large values; labels that are neither 0 to K - 1 nor numbers."""
    features, labels = data(200, 12, 4, 1.0)
    features = np.column_stack([features, np.full(200, 3.0), features[:, 0], 100 * features[:, 1]]).astype(
        "f"
    )
    names = np.array(["pear", "apple", "fig", "date"])[labels]
    for C in (1e-2, 10.0):
        probe, model = fit_linear_probe(features, names, C=C), optimum(features, names, C)
        assert distance(probe, model) < 1e-3
        assert probe.classes.tolist() == ["apple", "date", "fig", "pear"]
        assert probe.predict(features[:5]).tolist() == model.predict(features[:5]).tolist()
    constant = fit_linear_probe(np.ones((8, 3), "f"), np.arange(8) % 3 // 2, C=1.0)
    assert constant.predict(np.ones((2, 3))).tolist() == [0, 0]
    as_tensors = fit_linear_probe(torch.from_numpy(features), torch.from_numpy(labels), C=1.0)
    assert np.array_equal(as_tensors.weight, fit_linear_probe(features, labels, C=1.0).weight)


def test_what_cannot_be_fitted_is_one_line() -> None:
    features, labels = data(20, 4, 2, 1.0)
    damaged = features.copy()
    damaged[7, 2] = np.nan
    for arguments, C, message in (
        ((damaged, labels), 1.0, "row 7 holds NaN"),
        ((features, labels * 0), 1.0, "at least 2 classes are needed, not 1"),
        ((features, labels[:-1]), 1.0, r"must be \(N, D\) with N labels"),
        ((features[:, 0], labels), 1.0, r"must be \(N, D\) with N labels"),
        ((features, labels), 0.0, "C must be a positive number"),
        ((features, labels), np.inf, "C must be a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            fit_linear_probe(*arguments, C=C)
    with pytest.raises(UserError, match="class 5 has validation samples, but no training sample"):
        search_probe(features, labels, features[:3], np.array([0, 1, 5]))
    with pytest.warns(Warned, match="not converged after 1 steps"):
        fit_linear_probe(features, labels, C=1.0, max_iter=1)


def test_the_search_is_the_one_with_scikit_learn() -> None:
    """The same C in the same order, by Optuna's own loop over scikit-learn, and the same accuracies."""
    import optuna

    features, labels = data(900, 30, 6, 0.8)
    x, vx, tx, y, vy, ty = (*np.split(features, [400, 500]), *np.split(labels, [400, 500]))
    found = search_probe(x, y, vx, vy, trials=16, seed=3)
    tried: list[tuple[float, float]] = []

    def objective(trial: optuna.Trial) -> float:
        C = trial.suggest_float("C", 1e-5, 1e6, log=True)
        tried.append((C, float((optimum(x, y, C).predict(vx) == vy).mean())))
        return tried[-1][1]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=3))
    study.optimize(objective, 16)
    assert [C for C, _ in found.trials[:10]] == [C for C, _ in tried[:10]]
    for (_, ours), (_, theirs) in zip(found.trials[:10], tried[:10], strict=True):
        assert abs(ours - theirs) <= 0.011  # one sample of 100
    again = optimum(np.concatenate([x, vx]), np.concatenate([y, vy]), found.C)
    assert distance(found.probe, again) < 1e-2
    assert abs((found.probe.predict(tx) == ty).mean() - (again.predict(tx) == ty).mean()) < 0.001 + 1 / len(
        ty
    )
    assert found.accuracy == max(accuracy for _, accuracy in found.trials)
    assert search_probe(x, y, vx, vy, trials=16, seed=3).trials == found.trials
