import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from ubgen.measures import intervals
from ubgen.measures.intervals import (
    bootstrap_mean,
    bootstrap_mean_per_class,
    interval,
    mean_per_class,
    resampled_means,
    top1,
)


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_accuracies_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = zip(*pairs, strict=True)
    assert top1(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert mean_per_class(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_accuracies_of_a_perfect_a_constant_and_a_wrong_predictor() -> None:
    labels = np.repeat(["a", "b", "c"], [6, 3, 1])
    assert (top1(labels, labels), mean_per_class(labels, labels)) == (1, 1)
    assert top1(["a"] * 10, labels) == pytest.approx(0.6)
    assert mean_per_class(["a"] * 10, labels) == pytest.approx(1 / 3)
    assert (top1(["d"] * 10, labels), mean_per_class(["d"] * 10, labels)) == (0, 0)


def test_the_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).random(300) < 0.7
    ours = bootstrap_mean(values, resamples=20_000)
    theirs = scipy_bootstrap(
        (values.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == values.mean()
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.004)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        found = bootstrap_mean(rng.random(200) < 0.8, resamples=300, seed=seed)
        covered += found.low <= 0.8 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_mean_over_classes_resamples_all_samples_together() -> None:
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 7, 400))[::-1]
    values = rng.random(400)
    found = bootstrap_mean_per_class(values, labels, resamples=200, seed=3)
    order = np.argsort(labels, kind="stable")
    slow = []
    for counts in np.concatenate(list(intervals._resampled_counts(400, 200, 3))):
        sample = np.repeat(order, counts)
        slow.append(np.mean([values[sample][labels[sample] == c].mean() for c in np.unique(labels[sample])]))
    value = float(np.mean([values[labels == c].mean() for c in range(7)]))
    assert found == pytest.approx(interval(value, np.array(slow)))


def test_a_class_that_a_resample_lacks_does_not_count() -> None:
    assert bootstrap_mean_per_class([1, 1, 1, 0], [0, 0, 0, 1], resamples=20_000) == (0.5, 0.5, 1)


def test_resampled_means_of_columns_share_their_rows() -> None:
    values = np.random.default_rng(0).random((50, 2))
    both = resampled_means(np.column_stack([values, values.sum(1)]), 100, seed=1)
    np.testing.assert_allclose(both[:, 0] + both[:, 1], both[:, 2])


def test_intervals_depend_on_the_seed_and_not_on_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(1000)
    found = bootstrap_mean(values, seed=5)
    assert found == bootstrap_mean(values, seed=5)
    assert found != bootstrap_mean(values, seed=6)
    monkeypatch.setattr(intervals, "_AT_ONCE", 7000)
    assert bootstrap_mean(values, seed=5) == pytest.approx(found)


def test_certain_samples_have_no_spread() -> None:
    assert bootstrap_mean([True] * 9) == (1, 1, 1)
