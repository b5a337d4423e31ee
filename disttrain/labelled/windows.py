"""Questions and their contexts as BERT reads them: windows with a stride (Devlin et al. 2019, section 4.2; numpy)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.config.problems import Problem
from disttrain.data.tokenizer import Tokenizer
from disttrain.labelled.examples import Question

NULL = 0
"""Token position, that of [CLS], which stands for an answer that the window does not hold whole."""


@dataclass(frozen=True)
class Window:
    """``[CLS] question [SEP] part of the context [SEP]``: int64 arrays over its tokens, without padding."""

    question: int
    """Index of the question among those that were given."""
    ids: np.ndarray
    token_types: np.ndarray
    """1 from the context on."""
    offsets: np.ndarray
    """Characters [start, stop) of the context, white space at its start left out: (tokens, 2). -1 where a token is not
    of the context or stands for white space only."""
    start: int
    """Token at which the first answer starts, or `NULL`."""
    end: int
    """Token at which it ends (that token belongs to it), or `NULL`."""


def window_problems(tokenizer: Tokenizer, max_length: int, stride: int, max_question: int) -> list[Problem]:
    """Special tokens that the vocabulary lacks, no room for a context, and a stride that would skip tokens of it."""
    problems = []
    missing = [role for role in ("pad", "cls", "sep") if role not in tokenizer.special_ids]
    if missing:
        problems.append(Problem(("data.tokenizer",), f"the vocabulary has no special token for {', '.join(missing)}",
                                "use a vocabulary made for BERT"))  # fmt: skip
    room = max_length - max_question - 3
    if room < 1:
        problems.append(Problem((f"max_length={max_length}", f"max_question={max_question}"),
                                "a question of this length leaves no room for a context",
                                f"use max_length={max_question + 4} or more"))  # fmt: skip
    elif not 1 <= stride <= room:
        problems.append(Problem((f"stride={stride}", f"max_length={max_length}", f"max_question={max_question}"),
                                f"windows that hold {room} tokens of the context would leave some out",
                                f"use a stride from 1 to {room}"))  # fmt: skip
    return problems


def windows_of(
    tokenizer: Tokenizer, questions: Sequence[Question], max_length: int, stride: int, max_question: int = 64
) -> list[Window]:
    """All windows of all questions, in order.

    max_length: tokens of a window at most. stride: tokens of the context between the starts of two windows.
    max_question: tokens of a question that are kept. The last window is the first that reaches the end of the context.
    """
    asked = tokenizer.encode_batch([question.question for question in questions])
    places: dict[str, int] = {}
    for question in questions:  # the questions of a paragraph share its context
        places.setdefault(question.context, len(places))
    encoded = zip(places, tokenizer.encode_offsets(list(places)), strict=True)
    contexts = [(ids, trimmed_offsets(context, offsets)) for context, (ids, offsets) in encoded]
    found: list[Window] = []
    for index, question in enumerate(questions):
        ids, offsets = contexts[places[question.context]]
        answer = answer_tokens(offsets, question)
        found += _windows(tokenizer, index, asked[index][:max_question], ids, offsets, answer, max_length, stride)
    return found


def trimmed_offsets(context: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets without the white space that a token starts with; -1 for a token of nothing else."""
    trimmed = offsets.copy()
    for row, (start, stop) in enumerate(offsets):
        part = context[start:stop]
        trimmed[row, 0] = start + len(part) - len(part.lstrip())
        if not part.strip():
            trimmed[row] = -1
    return trimmed


def answer_tokens(offsets: np.ndarray, question: Question) -> tuple[int, int] | None:
    """The first and the last token of the context that hold a character of the first answer; None without one."""
    if not question.answers:
        return None
    text, begin = question.answers[0]
    inside = np.flatnonzero((offsets[:, 0] < begin + len(text)) & (offsets[:, 1] > begin))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _windows(tokenizer: Tokenizer, index: int, asked: np.ndarray, ids: np.ndarray, offsets: np.ndarray,
             answer: tuple[int, int] | None, max_length: int, stride: int) -> Iterator[Window]:  # fmt: skip
    cls, sep = (np.array([tokenizer.special_ids[role]], np.int64) for role in ("cls", "sep"))
    before = len(asked) + 2
    room = max_length - before - 1
    for begin in range(0, max(len(ids), 1), stride):
        part = ids[begin : begin + room]
        stop = begin + len(part)
        types = np.ones(before + len(part) + 1, np.int64)
        types[:before] = 0
        inner = np.full((len(types), 2), -1, np.int64)
        inner[before:-1] = offsets[begin:stop]
        start, end = NULL, NULL
        if answer is not None and begin <= answer[0] and answer[1] < stop:
            start, end = answer[0] - begin + before, answer[1] - begin + before
        yield Window(index, np.concatenate([cls, asked, sep, part, sep]), types, inner, start, end)
        if stop >= len(ids):
            return
