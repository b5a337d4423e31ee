from collections import Counter

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.labelled.splits import by_article, dev_from_train, folds, stratified_folds
from tests.unit.labelled.made import question

LABELS = ["a"] * 30 + ["b"] * 10


def same(left, right) -> bool:
    return all(np.array_equal(x, y) for a, b in zip(left, right, strict=True) for x, y in zip(a, b, strict=True))


def test_every_row_is_held_out_once():
    for found in (folds(40, 3, 1), stratified_folds(LABELS, 3, 1)):
        held = np.concatenate([held for _, held in found])
        assert sorted(held) == list(range(40))
        for training, one in found:
            assert sorted([*training, *one]) == list(range(40)) and len(one) in (13, 14)
            assert training.dtype == np.int64 and (np.diff(one) > 0).all()


def test_a_seed_gives_the_same_folds_and_another_one_others():
    assert same(folds(40, 4, 7), folds(40, 4, 7)) and not same(folds(40, 4, 7), folds(40, 4, 8))
    assert same(stratified_folds(LABELS, 4, 1 << 62), stratified_folds(LABELS, 4, 1 << 62))


def test_classes_have_their_share_in_every_fold():
    for _, held in stratified_folds(LABELS, 5, 3):
        assert Counter(LABELS[row] for row in held) == {"a": 6, "b": 2}
    with pytest.raises(RefusedInput, match=r"b \(10\)"):
        stratified_folds(LABELS, 11, 0)
    for number in (1, 41):
        with pytest.raises(RefusedInput, match="too few rows or folds"):
            folds(40, number, 0)


def test_a_part_of_training_held_out():
    training, held = dev_from_train(40, 0.1, 5, LABELS)
    assert Counter(LABELS[row] for row in held) == {"a": 3, "b": 1} and len(training) == 36
    assert not set(training) & set(held) and same([dev_from_train(40, 0.1, 5)], [dev_from_train(40, 0.1, 5)])
    assert len(dev_from_train(3, 0.01, 0)[1]) == 1
    with pytest.raises(RefusedInput, match="no such split"):
        dev_from_train(1, 0.5, 0)


def test_articles_stay_whole():
    questions = [question("x", title=f"article {row % 7}", id=str(row)) for row in range(70)]
    training, held = by_article(questions, 0.25, 1)
    titles = [{questions[row].title for row in part} for part in (training, held)]
    assert not titles[0] & titles[1] and len(titles[1]) == 2 and len(held) == 20 and len(training) == 50
    assert same([by_article(questions, 0.25, 1)], [by_article(questions, 0.25, 1)])
    assert any(not np.array_equal(by_article(questions, 0.25, seed)[1], held) for seed in range(2, 6))
    with pytest.raises(RefusedInput, match="no article"):
        by_article(questions, 1.0, 1)
    with pytest.raises(RefusedInput, match="no article"):
        by_article(questions[:1], 0.5, 1)
