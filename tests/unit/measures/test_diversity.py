import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from ubgen.core.errors import UserError
from ubgen.measures import rke, vendi
from ubgen.measures.diversity import within_class_variance


def unit(features: np.ndarray) -> np.ndarray:
    rows: np.ndarray = features / np.linalg.norm(features, axis=1, keepdims=True)
    return rows


@settings(deadline=None, max_examples=25)
@given(modes=st.integers(1, 8), each=st.integers(1, 9), scale=st.floats(0.1, 50))
def test_equal_modes_are_counted(modes: int, each: int, scale: float) -> None:
    features = np.tile(np.eye(8)[:modes], (each, 1)) * scale
    assert rke(features) == pytest.approx(modes)
    assert vendi(features) == pytest.approx(modes)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_both_are_entropies_of_the_kernels_eigenvalues(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    rows = unit(features.astype(float))
    values = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    values = values[values > 1e-12]
    assert vendi(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()))
    assert rke(features) == pytest.approx(1 / np.mean((rows @ rows.T) ** 2))
    assert 1 <= rke(features) <= vendi(features) <= len(features)


def test_rare_samples_move_vendi_more() -> None:
    features = np.concatenate([np.tile(np.eye(30)[:1], (270, 1)), np.eye(30)])
    assert vendi(features) > 1.5 * rke(features)


def test_variance_within_classes() -> None:
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(90, 5)), np.repeat([4, 7, 9], [20, 30, 40])
    rows = unit(features)
    # of n points, the sum of squared distances of pairs is n times that to the mean
    wanted = sum((pdist(rows[labels == k]) ** 2).sum() / (labels == k).sum() for k in (4, 7, 9)) / 90
    assert within_class_variance(features, labels) == pytest.approx(wanted)
    alike = np.tile(np.eye(3), (5, 1))
    assert within_class_variance(alike, np.tile(range(3), 5)) == pytest.approx(0)


@pytest.mark.parametrize("bad", [np.zeros((3, 4)), np.full((3, 4), np.nan), np.empty((0, 4))])
def test_what_has_no_direction_is_refused(bad: np.ndarray) -> None:
    for measure in (rke, vendi):
        with pytest.raises(UserError):
            measure(bad)
