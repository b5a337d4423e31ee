"""Answers to SQuAD's questions: the best span of a question's windows, and the official scores (fractions)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from disttrain.labelled.examples import Question
from disttrain.labelled.windows import Window

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """An answer in lower case, without ASCII punctuation and a, an, the, with single spaces (Rajpurkar et al. 2016,
    section 6.1, and its script)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 when both are equal once normalised, else 0."""
    return float(normalised(answer) == normalised(truth))


def token_f1(answer: str, truth: str) -> float:
    """F1 of the words of both, normalised and with repeats: 2 common / (words of one + words of the other)."""
    said, true = normalised(answer).split(), normalised(truth).split()
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0


def answer_scores(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """exact_match and f1: for each question the best over its true answers, then the mean over all questions."""
    exact = [max(exact_match(answer, truth) for truth, _ in question.answers)
             for answer, question in zip(answers, questions, strict=True)]  # fmt: skip
    overlap = [max(token_f1(answer, truth) for truth, _ in question.answers)
               for answer, question in zip(answers, questions, strict=True)]  # fmt: skip
    return {"exact_match": sum(exact) / len(exact), "f1": sum(overlap) / len(overlap)}


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    max_answer_length: int = 30,
) -> list[str]:
    """The text of each question's best span over all its windows; empty for a question without one.

    start_logits and end_logits: one array for each window, of at least its tokens. The score of a span is the logit of
    its first token as start + that of its last one as end; spans of at most max_answer_length tokens, inside the
    context, count (Devlin et al. 2019, section 4.2). Of equal scores the first wins.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        score, start, end = best_span(window, starts, ends, max_answer_length)
        if score > best[window.question][0]:
            begin, stop = int(window.offsets[start, 0]), int(window.offsets[end, 1])
            best[window.question] = score, questions[window.question].context[begin:stop]
    return [text for _, text in best]


def best_span(window: Window, starts: np.ndarray, ends: np.ndarray, max_length: int) -> tuple[float, int, int]:
    """Score, first and last token of a window's best span; minus infinity for a window without context."""
    tokens = len(window.ids)
    usable = window.offsets[:, 0] >= 0
    first = np.where(usable, np.asarray(starts, np.float64)[:tokens], -np.inf)
    last = np.where(usable, np.asarray(ends, np.float64)[:tokens], -np.inf)
    found = (-np.inf, 0, 0)
    for length in range(min(max_length, tokens)):
        scores = first[: tokens - length] + last[length:]
        place = int(scores.argmax())
        if scores[place] > found[0] or (scores[place] == found[0] and place < found[1]):
            found = (float(scores[place]), place, place + length)
    return found
