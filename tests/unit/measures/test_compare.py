"""Of two sets: the values of `distance`, intervals that cover, and a probe between them."""

import numpy as np
import pytest

from ubgen.core.errors import UserError
from ubgen.measures import frechet, kid, manifold
from ubgen.measures.compare import compare, tell_apart


def test_values_are_those_of_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)).astype(np.float32), (rng.normal(size=(60, 5)) + 0.3).astype(np.float32)
    found, near = compare(a, b), manifold(a, b)
    assert found.frechet.value == pytest.approx(frechet(a, b))
    assert found.kid.value == pytest.approx(kid(a, b))
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name).value == pytest.approx(getattr(near, name))
        assert getattr(found, name).low <= getattr(near, name) <= getattr(found, name).high
    assert (found.samples, found.frechet_samples, found.probe_samples) == (60, 60, 60)


def test_sets_of_unlike_size_are_cut() -> None:
    rng = np.random.default_rng(1)
    found = compare(rng.normal(size=(90, 3)), rng.normal(size=(40, 3)), samples=30, frechet_samples=35)
    assert (found.samples, found.frechet_samples, found.probe_samples) == (30, 35, 35)
    with pytest.raises(UserError, match="20 samples or more"):
        compare(rng.normal(size=(90, 3)), rng.normal(size=(19, 3)))


def test_coverage() -> None:
    rng = np.random.default_rng(2)
    found = [
        compare(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) * 1.2 + 0.4, samples=60) for _ in range(40)
    ]
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage"):
        intervals = [getattr(one, name) for one in found]
        expected = np.mean([i.value for i in intervals])  # at this number of samples
        covered = np.mean([i.low <= expected <= i.high for i in intervals])
        assert covered >= 0.85, name  # nominal 0.95, three standard errors below


def test_the_probe() -> None:
    rng = np.random.default_rng(3)
    same = tell_apart(rng.normal(size=(200, 4)), rng.normal(size=(300, 4)))
    assert same.low < 0.5 < same.high + 0.02
    other = tell_apart(rng.normal(size=(200, 4)) + 3, rng.normal(size=(200, 4)))
    assert other.low > 0.95
