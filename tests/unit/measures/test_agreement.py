"""Against plain loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid

from ubgen.measures.agreement import class_means, near_pairs, nearest_class, two_clusters


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_nearest_class_without_the_sample_itself() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 4], [10, 9, 8, 1])  # class 3 has no sample, class 4 only one
    x = rng.normal(size=(len(labels), 5)) + np.eye(5)[labels]
    found = nearest_class(x, labels, 5)
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        centroids = NearestCentroid().fit(unit(x)[others], labels[others])
        cosines = cosine_similarity(x[i : i + 1], centroids.centroids_)[0]
        assert found[i] == centroids.classes_[cosines.argmax()]
    assert 0.3 < (found == labels).mean() < 1


def test_class_means() -> None:
    x = np.random.default_rng(1).normal(size=(20, 3))
    labels = np.arange(20) % 3
    means = class_means(x, labels, 4)
    np.testing.assert_allclose(means[:3], [unit(x)[labels == c].mean(0) for c in range(3)])
    assert np.isnan(means[3]).all()


def test_near_pairs() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 3))
    near, pairs = near_pairs(x, 0.95, most=10)
    cosines = np.triu(cosine_similarity(x), 1)
    expected = np.argwhere(cosines >= 0.95)
    assert set(np.flatnonzero(near)) == set(expected.ravel())
    assert len(expected) > 10
    assert [p[2] for p in pairs] == pytest.approx(np.sort(cosines.ravel())[::-1][:10], abs=1e-5)
    assert all(p[2] == pytest.approx(cosines[p[0], p[1]], abs=1e-5) for p in pairs)


def test_pairs_across_blocks() -> None:
    x = np.random.default_rng(3).normal(size=(3000, 16))
    x[2999] = x[5]
    near, pairs = near_pairs(x, 0.999)
    assert [(i, j) for i, j, _ in pairs] == [(5, 2999)]
    assert np.flatnonzero(near).tolist() == [5, 2999]


@pytest.mark.parametrize("dim", [4, 200])
def test_two_groups_and_one(dim: int) -> None:
    rng = np.random.default_rng(4)
    centre = np.zeros(dim)
    centre[0] = 3
    noise = rng.normal(size=(120, dim)) * (0.3 / np.sqrt(dim))
    side = np.arange(120) % 3 == 0
    apart = noise + centre + np.where(side, 1, -1)[:, None] * np.eye(dim)[1]
    found = two_clusters(apart)
    assert found is not None
    assert found.separation > 0.9
    assert found.smaller == pytest.approx(1 / 3)
    assert (found.assigned == side).all() or (found.assigned != side).all()
    one = two_clusters(noise + centre)
    assert one is not None
    assert one.separation < 0.75


def test_small_groups_seldom_look_like_two() -> None:
    rng = np.random.default_rng(5)
    found = [two_clusters(np.eye(20)[0] + 0.1 * rng.normal(size=(30, 20))) for _ in range(100)]
    assert sum(one is not None and one.separation >= 0.8 for one in found) <= 4


def test_few_or_equal_samples() -> None:
    assert two_clusters(np.eye(29)) is None
    same = two_clusters(np.ones((40, 3)))
    assert same is not None
    assert same.separation == 0
