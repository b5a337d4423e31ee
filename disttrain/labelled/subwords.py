"""Labelled examples as a transformer reads them: subword ids, token types, and the place of each word's label (numpy).

Two forms. bert: ``[CLS] a [SEP] b [SEP]``, token type 1 from b on (Devlin et al. 2019, figure 4). gpt: ``a end b end``,
without token types, classified at the last token (Radford et al. 2018, figure 1, without its special start token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from disttrain.config.problems import Problem
from disttrain.data.tokenizer import Tokenizer
from disttrain.labelled.examples import Sentences, Tagged

Form = Literal["bert", "gpt"]

IGNORED = -100
"""Label of a token that has none: what torch's cross_entropy ignores."""


@dataclass(frozen=True)
class Encoded:
    """One example: int64 arrays over its tokens, without padding."""

    ids: np.ndarray
    token_types: np.ndarray


@dataclass(frozen=True)
class EncodedWords:
    """One tagged sentence: int64 arrays over its tokens, without padding."""

    ids: np.ndarray
    token_types: np.ndarray
    labels: np.ndarray
    """Number of the tag at the first subword of each word, `IGNORED` elsewhere."""
    first: np.ndarray
    """For every word of the sentence the token of its first subword; -1 for a word that was cut off."""


def subword_problems(tokenizer: Tokenizer, form: Form, max_length: int, texts: int) -> list[Problem]:
    """Special tokens that the vocabulary lacks, and a length without room for one token of each text."""
    roles = ("pad", "cls", "sep") if form == "bert" else ("end_of_text",)
    missing = [role for role in roles if role not in tokenizer.special_ids]
    problems = []
    if missing:
        problems.append(Problem(("data.tokenizer", f"model.family={form}"),
                                f"the vocabulary has no special token for {', '.join(missing)}",
                                "use a vocabulary that was made for this kind of model"))  # fmt: skip
    least = 2 * texts + (form == "bert")
    if max_length < least:
        problems.append(Problem((f"max_length={max_length}",), "there is no room for a token of each text",
                                f"use {least} or more"))  # fmt: skip
    return problems


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that are kept of two texts so that they fit: one after the other goes from the end of the longer text, the
    second one where they are equally long (Devlin et al. 2019's code)."""
    excess = max(0, first + second - room)
    levelled = min(excess, abs(first - second))
    if first > second:
        first -= levelled
    else:
        second -= levelled
    excess -= levelled
    return max(0, first - excess // 2), max(0, second - (excess + 1) // 2)


def encode_sentences(
    tokenizer: Tokenizer, examples: Sequence[Sentences], max_length: int, form: Form = "bert"
) -> list[Encoded]:
    """Each sentence or pair with its special tokens, cut to at most max_length tokens, the longer text first."""
    firsts = tokenizer.encode_batch([example.text for example in examples])
    seconds = iter(tokenizer.encode_batch([example.second for example in examples if example.second is not None]))
    return [joined(tokenizer, ids, next(seconds) if example.second is not None else None, max_length, form)
            for example, ids in zip(examples, firsts, strict=True)]  # fmt: skip


def joined(tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray | None, max_length: int, form: Form) -> Encoded:
    """One or two texts' ids with special tokens and token types, cut to at most max_length tokens."""
    start, end = _specials(tokenizer, form)
    room = max_length - len(start) - (1 if second is None else 2)
    if second is None:
        parts = [start, first[:room], end]
        return Encoded(np.concatenate(parts), np.zeros(sum(map(len, parts)), np.int64))
    keep_first, keep_second = longest_first(len(first), len(second), room)
    ids = np.concatenate([start, first[:keep_first], end, second[:keep_second], end])
    types = np.zeros(len(ids), np.int64)
    if form == "bert":
        types[len(start) + keep_first + 1 :] = 1
    return Encoded(ids, types)


def encode_tagged(
    tokenizer: Tokenizer, examples: Sequence[Tagged], labels: Sequence[str], max_length: int, form: Form = "bert"
) -> list[EncodedWords]:
    """Each sentence with its tags at the first subword of every word (Devlin et al. 2019, section 5.3).

    Every word but the first is encoded with a space before it, which BERT's vocabularies do not see and GPT-2's need. A
    word that the vocabulary drops (a control character) becomes its unknown token, or a space where it has none.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    spelled = [word if place == 0 else f" {word}" for example in examples for place, word in enumerate(example.words)]
    pieces = iter(tokenizer.encode_batch(spelled))
    return [_tagged(tokenizer, example, [next(pieces) for _ in example.words], numbers, max_length, form)
            for example in examples]  # fmt: skip


def word_tags(token_labels: np.ndarray, encoded: EncodedWords, labels: Sequence[str]) -> list[str]:
    """The tag of every word from the label numbers of all tokens; O for a word that was cut off."""
    return [labels[int(token_labels[place])] if place >= 0 else "O" for place in encoded.first]


def _tagged(tokenizer: Tokenizer, example: Tagged, pieces: list[np.ndarray], numbers: dict[str, int], max_length: int,
            form: Form) -> EncodedWords:  # fmt: skip
    start, end = _specials(tokenizer, form)
    dropped = tokenizer.special_ids.get("unknown")
    pieces = [ids if len(ids) else _instead(tokenizer, dropped) for ids in pieces]
    starts = len(start) + np.cumsum([0, *(len(ids) for ids in pieces)])[:-1].astype(np.int64)
    first = np.where(starts < max_length - 1, starts, -1)
    ids = np.concatenate([start, *pieces])[: max_length - 1]
    ids = np.concatenate([ids, end])
    found = np.full(len(ids), IGNORED, dtype=np.int64)
    for place, tag in zip(first, example.tags, strict=False):
        if place >= 0:
            found[place] = numbers[tag]
    return EncodedWords(ids, np.zeros(len(ids), np.int64), found, first)


def _instead(tokenizer: Tokenizer, unknown: int | None) -> np.ndarray:
    if unknown is not None:
        return np.array([unknown], np.int64)
    return tokenizer.encode(" ")[:1]


def _specials(tokenizer: Tokenizer, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Ids before the first text and after each one. Raises KeyError where `subword_problems` has one."""
    if form == "gpt":
        return np.zeros(0, np.int64), np.array([tokenizer.special_ids["end_of_text"]], np.int64)
    return (np.array([tokenizer.special_ids["cls"]], np.int64), np.array([tokenizer.special_ids["sep"]], np.int64))
