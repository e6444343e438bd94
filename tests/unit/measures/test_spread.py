"""Values are those of `rke`, `vendi` and `within_class_variance`; intervals cover what another draw gives."""

import numpy as np
import pytest

from ubgen.core.errors import UserError
from ubgen.measures import rke, vendi
from ubgen.measures.diversity import within_class_variance
from ubgen.measures.spread import spread, within_class_spread


def draw(rng: np.random.Generator, count: int, dim: int = 12) -> np.ndarray:
    centres = np.random.default_rng(5).normal(size=(6, dim)) * 1.2
    return centres[rng.integers(0, 6, count)] + rng.normal(size=(count, dim)) * 0.7


@pytest.mark.parametrize("count", [9, 50])  # fewer samples than dimensions, and more
def test_values(count: int) -> None:
    x = draw(np.random.default_rng(0), count)
    found = spread(x)
    assert found.rke.value == pytest.approx(rke(x))
    assert found.vendi.value == pytest.approx(vendi(x))
    assert found.variance.value == pytest.approx(within_class_variance(x, np.zeros(count)))
    labels = np.arange(count) % 3
    assert within_class_spread(x, labels).value == pytest.approx(within_class_variance(x, labels))


def test_both_ways_give_the_same_intervals() -> None:
    x = draw(np.random.default_rng(1), 12, 12)
    with_zeros = np.pad(x, ((0, 0), (0, 3)))  # 12 samples of 15 dimensions: the other way
    repeated = np.concatenate([x, x])  # twice the samples, the same distribution
    small, large = spread(with_zeros), spread(repeated)
    for name in ("rke", "vendi"):
        one, two = (np.log(getattr(s, name)) for s in (small, large))
        assert one[0] == pytest.approx(two[0])
        assert one[0] - one[1] == pytest.approx((two[0] - two[1]) * np.sqrt(2))


@pytest.mark.parametrize("count", [40, 300])
def test_coverage(count: int) -> None:
    rng = np.random.default_rng(2)
    draws = [draw(rng, count) for _ in range(200)]
    spreads = [spread(x) for x in draws]
    labels = np.arange(count) % 4
    intervals = {name: [getattr(s, name) for s in spreads] for name in ("rke", "vendi", "variance")}
    intervals["within"] = [within_class_spread(x, labels) for x in draws]
    for name, found in intervals.items():
        expected = np.median([i.value for i in found])  # at this number of samples
        covered = np.mean([i.low <= expected <= i.high for i in found])
        assert 0.9 <= covered <= 0.995, name  # nominal 0.95; its standard error here is 0.015


def test_copies_have_no_diversity() -> None:
    found = spread(np.ones((30, 4)))
    assert found.rke == pytest.approx((1, 1, 1))
    assert found.vendi == pytest.approx((1, 1, 1))
    with pytest.raises(UserError, match="two samples"):
        spread(np.ones((1, 4)))


def test_vendi_that_would_grow() -> None:
    rng = np.random.default_rng(3)
    assert spread(rng.normal(size=(50, 40))).vendi_is_limited_by_samples
    assert not spread(rng.normal(size=(500, 4))).vendi_is_limited_by_samples
