import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.core.errors import UserError
from ubgen.measures import few_shot_subset
from ubgen.measures.splits import apportion, draw_per_class, stratified_validation

labels_of_few_classes = st.lists(st.integers(0, 5), min_size=1, max_size=120)
fractions = st.floats(0.001, 1)
seeds = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None)
@given(labels=labels_of_few_classes, fraction=fractions, seed=seeds)
def test_a_few_shot_subset_has_the_same_share_of_each_class(
    labels: list[int], fraction: float, seed: int
) -> None:
    subset = few_shot_subset(labels, fraction, seed)
    assert subset.tolist() == sorted(set(subset.tolist()))
    chosen = np.array(labels)[subset]
    for label in set(labels):
        size, taken = labels.count(label), int((chosen == label).sum())
        assert taken >= min(2, size)
        assert abs(taken - max(fraction * size, min(2, size))) <= 0.5 + 1e-6
    assert subset.tolist() == few_shot_subset(np.array(labels), fraction, seed).tolist()


@settings(deadline=None)
@given(labels=labels_of_few_classes, a=fractions, b=fractions, seed=seeds)
def test_smaller_few_shot_subsets_are_part_of_larger_ones(
    labels: list[int], a: float, b: float, seed: int
) -> None:
    small, large = (few_shot_subset(labels, fraction, seed) for fraction in sorted((a, b)))
    assert set(small) <= set(large)
    assert few_shot_subset(labels, 1, seed).tolist() == list(range(len(labels)))


@pytest.mark.parametrize(
    ("size", "fraction", "taken"), [(67, 0.1, 7), (25, 0.1, 3), (20, 0.1, 2), (100, 0.29, 29)]
)
def test_a_share_is_rounded_with_halves_up(size: int, fraction: float, taken: int) -> None:
    assert len(few_shot_subset(np.zeros(size, np.int32), fraction, 0)) == taken


def test_labels_may_be_names() -> None:
    names = np.array(["cat", "ant", "bee"])[np.arange(30) % 3]
    assert sorted(names[few_shot_subset(names, 0.5, 4)]) == ["ant"] * 5 + ["bee"] * 5 + ["cat"] * 5


@settings(deadline=None)
@given(labels=labels_of_few_classes, share=st.floats(0.01, 0.99), seed=seeds)
def test_validation_leaves_each_class_a_training_sample(labels: list[int], share: float, seed: int) -> None:
    chosen = np.array(labels)[stratified_validation(labels, share, seed)]
    for label in set(labels):
        size, taken = labels.count(label), int((chosen == label).sum())
        assert taken == min(max(int(share * size + 1e-9), 1), size - 1)


def test_every_sample_has_the_same_chance() -> None:
    labels = np.repeat([0, 1], [10, 30])
    drawn = [stratified_validation(labels, 0.2, seed) for seed in range(2000)]
    times = np.bincount(np.concatenate(drawn), minlength=40) / 2000
    np.testing.assert_allclose(times, 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 2000))


def test_the_validation_samples_of_a_subset_have_the_same_chance() -> None:
    """The two draws of a seed are independent."""
    labels, times = np.zeros(20, np.int32), np.zeros(20)
    for seed in range(2000):
        subset = few_shot_subset(labels, 0.5, seed)
        times[subset[stratified_validation(labels[subset], 0.2, seed)]] += 1
    np.testing.assert_allclose(times / 2000, 0.1, atol=5 * np.sqrt(0.1 * 0.9 / 2000))


def test_draws_stay_as_they_are() -> None:
    """Results of another NumPy name the same samples."""
    labels = np.arange(20) % 2
    assert few_shot_subset(labels, 0.3, 0).tolist() == [1, 4, 5, 10, 13, 18]
    assert stratified_validation(labels, 0.2, 0).tolist() == [7, 8, 10, 13]


@settings(deadline=None)
@given(labels=labels_of_few_classes, data=st.data())
def test_an_apportioned_total_is_exact_and_proportional(labels: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, len(labels)))
    counts = apportion(labels, total)
    sizes = np.bincount(np.unique(labels, return_inverse=True)[1])
    assert counts.sum() == total
    assert (np.abs(counts - sizes * total / len(labels)) < 1).all()
    assert len(draw_per_class(labels, counts, 1)) == total


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_wrong_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        few_shot_subset([0, 1], fraction, 0)


@pytest.mark.parametrize("labels", [[], [[0, 1]]])
def test_labels_of_another_shape_are_refused(labels: list[object]) -> None:
    with pytest.raises(UserError, match="one row of at least one sample"):
        few_shot_subset(labels, 0.5, 0)
