"""Frechet distance and KID of the same features, by torch-fidelity.

It is not installed with the other packages for development: it brings a top-level package `tests`, which hides ours
from the processes that tests start.
"""

import numpy as np
import pytest
import torch

from ubgen.measures import frechet, kid

fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
peer_kid = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity is not installed")


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 8)), rng.normal(size=(300, 8)) + 0.4
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a, b


def test_frechet_distance(sets: tuple[np.ndarray, np.ndarray]) -> None:
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in sets]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet(*sets) == pytest.approx(next(iter(theirs.values())), rel=1e-5)


def test_kernel_distance(sets: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = sets
    theirs = peer_kid.kernel_mmd(a, b, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
    assert kid(a, b) == pytest.approx(float(theirs), rel=1e-6)
