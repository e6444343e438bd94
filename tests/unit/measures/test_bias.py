"""TI, CB_avg and the background gap: cases worked by hand, extreme predictors, and independent implementations."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, recall_score

from ubgen.core.errors import UserError
from ubgen.measures import background_gap, context_score, shape_bias
from ubgen.measures.bias import wilson


def test_texture_inclination_by_hand():
    #                shape   texture   neither  same     texture  texture
    predicted = ["cat", "elephant", "knife", "dog", "bear", "oven"]
    shapes = ["cat", "cat", "cat", "dog", "bird", "boat"]
    textures = ["elephant", "elephant", "elephant", "dog", "bear", "oven"]
    found = shape_bias(predicted, shapes, textures)
    assert (found.shape_correct, found.texture_correct, found.counted, found.images) == (1, 3, 4, 5)
    assert found.texture_inclination == 75.0
    assert found.standard_error == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 4))


@pytest.mark.parametrize("form", [list, np.array, lambda x: np.array(x, object), lambda x: np.array(x, "S")])
def test_predictions_come_in_many_forms(form):
    """Names of any width, as lists, arrays of text, of objects, of bytes."""
    found = shape_bias(form(["cat", "elephant"]), ["cat", "cat"], form(["oven", "elephant"]))
    assert (found.shape_correct, found.texture_correct) == (1, 1)


def test_numbers_instead_of_names():
    found = shape_bias(torch.tensor([3, 5]), [3, 3], [4, 5])
    assert (found.shape_correct, found.texture_correct) == (1, 1)


def test_a_missing_answer_counts_for_neither():
    found = shape_bias([None, "na", "cat"], ["cat", "cat", "cat"], ["dog", "dog", "dog"])
    assert (found.counted, found.texture_inclination) == (1, 0.0)


def test_all_by_texture_all_by_shape_and_neither():
    shapes, textures = ["a", "a", "b"], ["b", "c", "c"]
    assert shape_bias(shapes, shapes, textures).texture_inclination == 0.0
    assert shape_bias(textures, shapes, textures).texture_inclination == 100.0
    nothing = shape_bias(["z"] * 3, shapes, textures)
    assert (nothing.texture_inclination, nothing.standard_error, nothing.interval) == (None, None, None)
    assert nothing.images == 3
    assert shape_bias([], [], []).texture_inclination is None
    assert shape_bias(["a"], ["a"], ["a"]).texture_inclination is None


def test_a_random_and_a_constant_predictor_have_no_inclination():
    rng = np.random.default_rng(0)
    shapes, textures, predicted = (rng.integers(0, 16, 50_000) for _ in range(3))
    for answers in (predicted, np.full(50_000, 7)):
        found = shape_bias(answers, shapes, textures)
        assert found.texture_inclination == pytest.approx(50, abs=4 * found.standard_error)


def test_wilson_is_scipys():
    for successes, count in [(0, 5), (5, 5), (1, 3), (147, 700)]:
        theirs = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
        assert wilson(successes, count) == pytest.approx((100 * theirs.low, 100 * theirs.high), rel=1e-6)
    assert wilson(0, 0) is None


def test_context_score_by_hand():
    """Accuracies 80, 40, 60 and 20 %: ratios 1/2, 3/4, 1/4."""
    uncommon = np.repeat(range(4), 5)
    correct = np.tile(range(5), 4) < np.repeat([4, 2, 3, 1], 5)
    found = context_score(correct, uncommon)
    assert found.accuracy == (80.0, 40.0, 60.0, 20.0)
    assert found.count == (5, 5, 5, 5)
    assert found.cb_avg == pytest.approx(50.0)
    assert found.cb_12 == pytest.approx(62.5)
    order = np.random.default_rng(0).permutation(20)
    assert context_score(np.array(correct, bool)[order], np.array(uncommon, float)[order]) == found


def test_context_score_may_be_above_100():
    assert context_score([1, 0, 1, 1, 1], [0, 0, 1, 2, 3]).cb_avg == 200.0


def test_the_published_sizes_have_the_noise_that_is_known():
    """A timm ResNet-50 on FOCUS: CB_avg 53.0 with a binomial error of 5.0, and 50.0 with 1.3 over k = 1, 2."""
    count, right = [14146, 5974, 674, 21], [10242, 2652, 189, 9]
    correct = np.concatenate([np.arange(n) < r for n, r in zip(count, right, strict=True)])
    found = context_score(correct, np.repeat(np.arange(4), count))
    assert found.count == tuple(count)
    assert found.correct == tuple(right)
    assert found.cb_avg == pytest.approx(53.08, abs=0.01)
    assert found.cb_avg_standard_error == pytest.approx(5.0, abs=0.1)
    assert found.cb_12 == pytest.approx(50.02, abs=0.01)
    assert found.cb_12_standard_error == pytest.approx(1.3, abs=0.05)


def test_partitions_are_scikit_learns_accuracies():
    rng = np.random.default_rng(1)
    label, predicted, uncommon = rng.integers(0, 3, 500), rng.integers(0, 3, 500), rng.integers(0, 4, 500)
    found = context_score(label == predicted, uncommon)
    for k in range(4):
        theirs = accuracy_score(label[uncommon == k], predicted[uncommon == k])
        assert found.accuracy[k] == pytest.approx(100 * theirs)
    # accuracy on partitions is the recall of "right" among the images of one k
    recalls = recall_score(
        uncommon, np.where(label == predicted, uncommon, -1), labels=range(4), average=None
    )
    assert found.accuracy == pytest.approx(tuple(100 * recalls))


def test_the_bootstrap_is_the_one_over_images():
    """Against resampling the images of each partition one by one."""
    rng = np.random.default_rng(2)
    count = [60, 40, 30, 12]
    parts = [rng.random(n) < p for n, p in zip(count, (0.8, 0.5, 0.6, 0.4), strict=True)]

    def statistic(*resampled):
        accuracy = [part.mean(axis=-1) for part in resampled]
        return 100 * (accuracy[1] + accuracy[2] + accuracy[3]) / accuracy[0] / 3

    theirs = stats.bootstrap(
        [p.astype(float) for p in parts], statistic, n_resamples=10_000, method="percentile", rng=3
    )
    found = context_score(np.concatenate(parts), np.repeat(range(4), count))
    assert found.cb_avg_standard_error == pytest.approx(theirs.standard_error, rel=0.04)
    ours = np.array(found.cb_avg_interval)
    assert ours == pytest.approx(np.array(theirs.confidence_interval), abs=0.2 * theirs.standard_error)
    assert context_score(np.concatenate(parts), np.repeat(range(4), count), seed=9) != found


@pytest.mark.parametrize(
    ("uncommon", "correct", "cb_avg", "cb_12"),
    [
        ([0, 0, 1, 2], [1, 0, 1, 0], None, 100.0),  # no image with k = 3
        ([0, 1, 3], [1, 1, 1], None, None),
        ([1, 2, 3], [1, 1, 1], None, None),
        ([0, 1, 2, 3], [0, 1, 1, 1], None, None),  # nothing to be relative to
        ([0, 1, 2, 3], [1, 0, 0, 0], 0.0, 0.0),
        ([], [], None, None),
    ],
)
def test_what_has_no_value_is_none(uncommon, correct, cb_avg, cb_12):
    found = context_score(correct, uncommon)
    assert (found.cb_avg, found.cb_12) == (cb_avg, cb_12)
    for k in range(4):
        assert found.count[k] == uncommon.count(k)
        assert (found.accuracy[k] is None) == (found.count[k] == 0)
    if cb_avg is None:
        assert (found.cb_avg_standard_error, found.cb_avg_interval) == (None, None)


def test_no_interval_where_too_many_resamples_have_no_value():
    found = context_score([1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 2, 3])
    assert found.cb_avg == pytest.approx(300)
    assert (found.cb_avg_standard_error, found.cb_avg_interval) == (None, None)


def test_a_perfect_a_constant_and_a_random_predictor_lose_nothing():
    rng = np.random.default_rng(4)
    uncommon, label = rng.integers(0, 4, 40_000), rng.integers(0, 10, 40_000)
    assert context_score(np.ones(40_000), uncommon).cb_avg == 100.0
    for predicted in (np.zeros(40_000), rng.integers(0, 10, 40_000)):
        found = context_score(label == predicted, uncommon)
        assert found.cb_avg == pytest.approx(100, abs=4 * found.cb_avg_standard_error)


def test_background_gap_by_hand():
    found = background_gap([1, 1, 1, 0], [1, 0, 0, 0])
    assert found.gap == 50.0
    assert (found.same_accuracy, found.rand_accuracy, found.count) == (75.0, 25.0, 4)
    assert found.standard_error == pytest.approx(100 * np.std([0, 1, 1, 0], ddof=1) / 2)
    assert background_gap([False, True], [True, True]).gap == -50.0


def test_the_pairs_are_what_makes_the_error_small():
    rng = np.random.default_rng(5)
    same = rng.random(4050) < 0.862
    rand = same & (rng.random(4050) < 0.92)
    paired, unpaired = background_gap(same, rand), background_gap(same, rand, paired=False)
    assert paired.gap == unpaired.gap
    assert paired.standard_error < 0.6 * unpaired.standard_error
    theirs = stats.ttest_ind(same.astype(float), rand.astype(float), equal_var=False)
    assert unpaired.gap / unpaired.standard_error == pytest.approx(theirs.statistic, rel=1e-6)


def test_paired_error_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(6)
    same, rand = rng.random(500) < 0.8, rng.random(500) < 0.7
    found = background_gap(same, rand)
    theirs = stats.ttest_rel(same.astype(float), rand.astype(float))
    assert found.gap / found.standard_error == pytest.approx(theirs.statistic, rel=1e-9)
    again = stats.bootstrap(
        [(same.astype(float) - rand) * 100], np.mean, n_resamples=10_000, method="percentile", rng=0
    )
    assert np.array(found.interval) == pytest.approx(np.array(again.confidence_interval), abs=0.3)


def test_gaps_without_a_value():
    nothing = background_gap([], [])
    assert (nothing.gap, nothing.standard_error, nothing.interval, nothing.count) == (None, None, None, 0)
    one = background_gap([1], [0])
    assert (one.gap, one.standard_error, one.interval) == (100.0, None, None)
    assert background_gap([1, 1], [], paired=False).gap is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: shape_bias(["a"], ["a", "b"], ["a", "b"]),
            "differ in length: predicted 1, shapes 2, textures 2",
        ),
        (lambda: shape_bias([1], ["a"], ["b"]), "shapes holds names and predicted holds numbers"),
        (lambda: shape_bias([["a"]], ["a"], ["b"]), r"one entry for each image, not the shape \(1, 1\)"),
        (lambda: context_score([1, 0], [0]), "differ in length: correct_N 2, uncommon_N 1"),
        (lambda: context_score([2], [0]), "correct_N must be true or false"),
        (lambda: context_score([np.nan], [0]), "correct_N must be true or false"),
        (lambda: context_score([1], [4]), "uncommon_N must be 0, 1, 2 or 3, not 4"),
        (lambda: context_score([1], [-1]), "uncommon_N must be 0, 1, 2 or 3, not -1"),
        (lambda: context_score([1], [0.5]), "uncommon_N must be whole numbers"),
        (lambda: context_score([1], ["x"]), "uncommon_N must be whole numbers"),
        (lambda: background_gap([1, 0], [1]), "differ in length: same_correct_N 2, rand_correct_N 1"),
        (lambda: background_gap([0.5], [1]), "same_correct_N must be true or false"),
    ],
)
def test_wrong_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_importing_measures_is_light():
    program = "import sys, ubgen.measures; print(sorted({'torch', 'sklearn', 'scipy', 'optuna'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
