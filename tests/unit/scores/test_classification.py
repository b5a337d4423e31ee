import math

import pytest

from disttrain.scores.classification import accuracy, binary_scores, macro_scores, matthews, pearson, spearman

# of class 1: 3 found (tp), 1 wrongly (fp), 2 missed (fn), 4 rightly of class 0 (tn)
TRUTH = list("1111100000")
SAID = list("1110010000")


def test_binary_scores_by_hand():
    assert accuracy(SAID, TRUTH) == pytest.approx(7 / 10, abs=1e-12)
    expected = {"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3}
    assert binary_scores(SAID, TRUTH, "1") == pytest.approx(expected, abs=1e-12)
    assert matthews(SAID, TRUTH) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6), abs=1e-12)


def test_macro_scores_are_the_mean_over_classes():
    other = {"precision": 4 / 6, "recall": 4 / 5, "f1": 8 / 11}
    expected = {name: (value + other[name]) / 2 for name, value in binary_scores(SAID, TRUTH, "1").items()}
    assert macro_scores(SAID, TRUTH, ("0", "1")) == pytest.approx(expected, abs=1e-12)
    three = macro_scores(SAID, TRUTH, ("0", "1", "never"))
    assert three["recall"] == pytest.approx(expected["recall"] * 2 / 3, abs=1e-12)


def test_what_is_divided_by_nothing():
    assert binary_scores(["0", "0"], ["0", "1"], "1") == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert matthews(["1", "1"], ["0", "1"]) == 0.0
    assert math.isnan(pearson([1.0, 1.0], [0.0, 1.0])) and math.isnan(spearman([1.0], [1.0]))


def test_correlations_by_hand():
    said, truth = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    # deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): their product is 1, their squares 42/9 and 2
    assert pearson(said, truth) == pytest.approx(1 / math.sqrt(42 / 9 * 2), abs=1e-12)
    assert spearman(said, truth) == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8), abs=1e-12)
    assert spearman([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(3) / 2, abs=1e-12)
