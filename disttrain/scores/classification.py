"""Scores of classes and of numbers, computed by scikit-learn and scipy. All are fractions, not percent.

tp, fp and fn: rows of a class that are found, rows wrongly said to be of it, and rows of it that are missed.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_ZERO: Any = 0.0
"""What 0 / 0 is."""


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the rows whose class is right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def binary_scores(predictions: Sequence[str], references: Sequence[str], positive: str) -> dict[str, float]:
    """precision tp / (tp + fp), recall tp / (tp + fn) and f1, their harmonic mean, of one class; 0 for 0 / 0."""
    from sklearn.metrics import precision_recall_fscore_support

    truth, said = np.asarray(references) == positive, np.asarray(predictions) == positive
    return _named(precision_recall_fscore_support(truth, said, average="binary", zero_division=_ZERO))


def macro_scores(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """precision, recall and f1, each the mean over the classes of that class's own; 0 for 0 / 0."""
    from sklearn.metrics import precision_recall_fscore_support

    return _named(precision_recall_fscore_support(references, predictions, labels=list(labels), average="macro",
                                                  zero_division=_ZERO))  # fmt: skip


def matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Matthews correlation of two classes, (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)), from -1 to 1.

    More classes: Gorodkin 2004. 0 where all predictions, or all references, are of one class (Warstadt et al. 2019).
    """
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson's correlation, cov(x, y) / (sd(x) sd(y)); NaN where one side is constant or has one row."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal numbers having their mean rank; NaN as there."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(measure: Callable[..., Any], predictions: Sequence[float], references: Sequence[float]) -> float:
    if len(references) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant side, of which the result says enough
        return float(measure(np.asarray(predictions, np.float64), np.asarray(references, np.float64))[0])


def _named(three: tuple[Any, ...]) -> dict[str, float]:
    return {"precision": float(three[0]), "recall": float(three[1]), "f1": float(three[2])}
