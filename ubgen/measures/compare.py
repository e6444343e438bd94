"""How one set of features stands to a reference, with intervals: distances, the manifolds, and a probe between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubgen.core.errors import UserError
from ubgen.measures.bias import wilson
from ubgen.measures.distance import frechet, kid, manifold
from ubgen.measures.intervals import Interval, bootstrap_mean

GROUPS = 10
_T = 2.262157  # of 95 % with 9 degrees of freedom
_C = 0.01  # the probe's; fixed, so that no figure is chosen by itself


@dataclass(frozen=True)
class Comparison:
    """Each with a 95 % interval."""

    frechet: Interval
    frechet_samples: int
    kid: Interval
    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval
    samples: int
    """Of each set, for all but the Frechet distance and the probe."""
    probe_accuracy: Interval
    """Of a linear probe that tells the sets apart; 0.5 where it cannot."""
    probe_samples: int


def compare(
    features_ND: Any,
    reference_MD: Any,
    *,
    samples: int = 4000,
    frechet_samples: int = 20_000,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """The measures of `distance`, on equally many samples of both sets, drawn at random: at most `samples`.

    Intervals: delete-a-group jackknife. Both draws are cut into 10 groups; each measure is computed anew without the
    g-th group of both, and the spread of these ten gives the standard error, with Student's t of 9 degrees of freedom.
    Intervals of shares are at least as wide as Wilson's.
    No sample comes twice, as it would in a bootstrap, where a copy is its own nearest neighbour. The Frechet distance,
    whose bias shrinks with N, has up to `frechet_samples`. UserError for sets with fewer than 20 samples.
    """
    least = min(len(features_ND), len(reference_MD))
    if least < 2 * GROUPS:
        raise UserError(f"comparing two sets needs {2 * GROUPS} samples or more in each, not {least}")
    count, many = min(least, samples), min(least, frechet_samples)
    rng = np.random.default_rng(seed)
    a, b = _drawn(features_ND, many, rng), _drawn(reference_MD, many, rng)
    total = 2 * (GROUPS + 1) + 1
    steps = iter(range(1, total + 1))

    def near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = manifold(a, b)
        result = np.array([kid(a, b), found.precision, found.recall, found.density, found.coverage])
        report(next(steps), total)
        return result

    def far(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.array([frechet(a, b)])
        report(next(steps), total)
        return result

    kernel, precision, recall, density, coverage = _jackknife(near, a[:count], b[:count])
    (distance,) = _jackknife(far, a, b)
    probe_count = min(many, 5000)
    accuracy = tell_apart(a[:probe_count], b[:probe_count], seed=seed)
    report(total, total)
    return Comparison(
        _above_zero(distance),
        many,
        kernel,
        _share(precision, count),
        _share(recall, count),
        _above_zero(density),
        _share(coverage, count),
        count,
        accuracy,
        probe_count,
    )


def tell_apart(a_ND: np.ndarray, b_MD: np.ndarray, *, folds: int = 5, seed: int = 0) -> Interval:
    """Accuracy of a linear probe that says which set a sample is from ("Name That Dataset"), by cross-validation.

    Logistic regression with C = 0.01 on the features, standardised by the training folds. Interval: bootstrap over the
    held-out predictions. Sets of unlike size are cut to the smaller one, so that chance is 0.5.
    """
    from ubgen.measures.probe import fit_linear_probe  # with PyTorch

    least = min(len(a_ND), len(b_MD))
    rng = np.random.default_rng(seed)
    x = np.concatenate([_drawn(a_ND, least, rng), _drawn(b_MD, least, rng)]).astype(np.float32)
    labels = np.repeat([0, 1], least)
    fold = np.tile(np.arange(least) % folds, 2)  # rows are in random order
    correct = np.empty(len(x))
    for held in range(folds):
        train = fold != held
        mean, deviation = x[train].mean(0), x[train].std(0) + 1e-6
        probe = fit_linear_probe((x[train] - mean) / deviation, labels[train], C=_C, device="cpu")
        correct[~train] = probe.predict((x[~train] - mean) / deviation) == labels[~train]
    return bootstrap_mean(correct, seed=seed)


def _drawn(features: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, D) float32 rows in random order."""
    chosen = rng.permutation(len(features))[:count]
    order = np.argsort(chosen)  # a file is read forwards
    rows = np.empty((count, features.shape[1]), np.float32)
    rows[order] = features[chosen[order]]
    return rows


def _jackknife(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray
) -> list[Interval]:
    whole = statistic(a, b)
    group = np.arange(len(a)) % GROUPS
    without = np.stack([statistic(a[group != g], b[group != g]) for g in range(GROUPS)])
    errors = np.sqrt((GROUPS - 1) * without.var(0))
    half = _T * errors
    return [Interval(float(v), float(v - h), float(v + h)) for v, h in zip(whole, half, strict=True)]


def _share(found: Interval, count: int) -> Interval:
    """The jackknife's interval, widened to Wilson's: ten groups that agree on 1 do not prove that it is 1."""
    low, high = wilson(round(found.value * count), count) or (0.0, 100.0)
    return Interval(found.value, max(0.0, min(found.low, low / 100)), min(1.0, max(found.high, high / 100)))


def _above_zero(found: Interval) -> Interval:
    return Interval(found.value, max(0.0, found.low), found.high)
