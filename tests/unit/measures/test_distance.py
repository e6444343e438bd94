import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from ubgen.core.errors import UserError
from ubgen.measures import frechet, kid, manifold


def two_sets(n: int = 300, m: int = 250, width: int = 7, shift: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width))
    return rng.normal(size=(n, width)) @ mix, rng.normal(shift, 1.2, size=(m, width)) @ mix


def test_frechet_is_the_formula_with_a_matrix_square_root() -> None:
    a, b = two_sets()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = mean + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    shifted = a + np.array([3, 4, 0, 0, 0, 0, 0])
    assert frechet(a, shifted) == pytest.approx(25, rel=1e-6)


def test_frechet_of_fewer_samples_than_dimensions() -> None:
    a, b = two_sets(5, 4, 30)
    spread = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False))
    cross = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / np.sqrt(4 * 3)
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * cross
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def test_kid_is_the_unbiased_estimate() -> None:
    a, b = two_sets()
    options = {"degree": 3, "gamma": 1 / a.shape[1], "coef0": 1}
    aa, bb, ab = (polynomial_kernel(x, y, **options) for x, y in ((a, a), (b, b), (a, b)))
    first, second = ((x.sum() - np.trace(x)) / (len(x) * (len(x) - 1)) for x in (aa, bb))
    wanted = first + second - 2 * ab.mean()
    assert kid(a, b) == pytest.approx(wanted, rel=1e-9)
    near = [kid(a, b, limit=200, seed=seed) for seed in range(30)]
    assert np.mean(near) == pytest.approx(wanted, rel=0.1)


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    rng = np.random.default_rng(1)
    found = [kid(rng.normal(size=(60, 4)), rng.normal(size=(60, 4))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_manifold_is_that_of_the_definitions(k: int) -> None:
    samples, reference = two_sets(220, 180, shift=0.8)

    def radii(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]
        return found

    distances = cdist(reference, samples)
    balls = distances < radii(reference)[:, None]
    found = manifold(samples, reference, k)
    assert found.precision == pytest.approx(balls.any(0).mean())
    assert found.recall == pytest.approx((distances < radii(samples)).any(1).mean())
    assert found.density == pytest.approx(balls.sum(0).mean() / k)
    assert found.coverage == pytest.approx((distances.min(1) < radii(reference)).mean())


def test_half_the_modes_are_precise_and_half_covered() -> None:
    rng = np.random.default_rng(2)
    reference = np.concatenate([rng.normal(0, 1, (300, 3)), rng.normal(50, 1, (300, 3))])
    found = manifold(rng.normal(0, 1, (300, 3)), reference)
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage == pytest.approx(0.5, abs=0.05)


def test_sets_that_say_nothing_are_refused() -> None:
    a, _ = two_sets(20)
    broken = a.copy()
    broken[3, 2] = np.inf
    for distance in (frechet, kid, manifold):
        with pytest.raises(UserError, match="sample 3 are not finite"):
            distance(broken, a)
        with pytest.raises(UserError):
            distance(a[:1], a)
