"""Which examples are trained on and which are held out: folds, a part of the training set, whole articles.

Every split is a pure function of its arguments. Rows are numbers into the examples, ascending, int64.
"""

from collections.abc import Sequence

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Question

Rows = tuple[np.ndarray, np.ndarray]
"""Rows of training and rows held out."""


def folds(examples: int, number: int, seed: int) -> list[Rows]:
    """k-fold cross-validation in random order: every row is held out once, in folds that differ by one row at most.

    Raises RefusedInput when there are fewer than two folds or fewer examples than folds.
    """
    from sklearn.model_selection import KFold

    _check(examples, number)
    return [_rows(pair) for pair in KFold(number, shuffle=True, random_state=_state(seed)).split(np.zeros(examples))]


def stratified_folds(labels: Sequence[str], number: int, seed: int) -> list[Rows]:
    """The same with the share of every class about equal in all folds (Kohavi 1995).

    Raises RefusedInput when a class has fewer rows than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    _check(len(labels), number)
    names, counts = np.unique(np.asarray(labels), return_counts=True)
    rare = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < number]
    if rare:
        raise RefusedInput([Problem((f"folds={number}",), f"too few rows for a row in every fold: {', '.join(rare)}",
                                    "use fewer folds, or leave the class out")])  # fmt: skip
    splitter = StratifiedKFold(number, shuffle=True, random_state=_state(seed))
    return [_rows(pair) for pair in splitter.split(np.zeros(len(labels)), np.asarray(labels))]


def dev_from_train(examples: int, fraction: float, seed: int, labels: Sequence[str] | None = None) -> Rows:
    """A share of the training rows held out, at least one; with labels, the share of every class about equal.

    Raises RefusedInput when nothing would be left of either part, or a class has a single row.
    """
    from sklearn.model_selection import train_test_split

    held_out = max(1, round(examples * fraction))
    try:
        pair = train_test_split(np.arange(examples), test_size=held_out, random_state=_state(seed),
                                stratify=None if labels is None else np.asarray(labels))  # fmt: skip
    except ValueError as error:
        problem = Problem((f"fraction={fraction}", f"examples={examples}"), f"no such split: {error}",
                          "use another fraction, or more examples")  # fmt: skip
        raise RefusedInput([problem]) from error
    return _rows((np.asarray(pair[0]), np.asarray(pair[1])))


def by_article(questions: Sequence[Question], fraction: float, seed: int) -> Rows:
    """Whole articles held out, taken in random order until they have at least this share of the questions.

    Raises RefusedInput when the questions are of one article, or nothing would be left to train on.
    """
    titles = sorted({question.title for question in questions})
    order = np.random.default_rng(seed).permutation(len(titles))
    counts = {title: 0 for title in titles}
    for question in questions:
        counts[question.title] += 1
    chosen: set[str] = set()
    for place in order:
        if sum(counts[title] for title in chosen) >= fraction * len(questions):
            break
        chosen.add(titles[place])
    if not chosen or len(chosen) == len(titles):
        raise RefusedInput([Problem((f"fraction={fraction}", f"articles={len(titles)}"),
                                    "one of the two parts would have no article",
                                    "use another fraction, or more articles")])  # fmt: skip
    held = np.array([question.title in chosen for question in questions])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _check(examples: int, number: int) -> None:
    if not 2 <= number <= examples:
        raise RefusedInput([Problem((f"folds={number}", f"examples={examples}"), "there are too few rows or folds",
                                    f"use 2 to {examples} folds")])  # fmt: skip


def _rows(pair: tuple[np.ndarray, np.ndarray]) -> Rows:
    return np.sort(pair[0]).astype(np.int64), np.sort(pair[1]).astype(np.int64)


def _state(seed: int) -> int:
    """A seed as scikit-learn takes it."""
    return seed % (1 << 32)
