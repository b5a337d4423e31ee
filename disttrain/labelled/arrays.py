"""Labelled examples as the arrays of a model's batches, all of one length (numpy).

`tokens`, `token_types` [N, S] and `attention_mask` bool [N, S]; `targets` int64 [N] of classes, float32 [N] of numbers,
[N, S] of tags and [N, 2] of the ends of answers, -100 where there is none. `characters` [N, S, L] are the bytes of each
word's UTF-8, 0 behind them. `answerable` bool [N, S] marks where an answer may begin or end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.config.schema import Config
from disttrain.data.tokenizer import Tokenizer
from disttrain.labelled.examples import Example, Question, Sentences, Tagged
from disttrain.labelled.subwords import IGNORED, Form, encode_sentences, encode_tagged
from disttrain.labelled.tags import to_bioes
from disttrain.labelled.windows import Window, windows_of
from disttrain.labelled.words import Vocabulary
from disttrain.sets import SETS, LabelledSet, tags_of

Arrays = dict[str, np.ndarray]
SEPARATOR = "[SEP]"
"""A word between the two texts of a pair."""


@dataclass(frozen=True)
class Encoded:
    """A split in arrays."""

    arrays: Arrays
    places: list[np.ndarray]
    """For tags: the token of each word, -1 for one that was cut off."""
    windows: list[Window]
    """For answers."""


def form_of(config: Config) -> Form:
    """How a transformer of this family wants its texts joined."""
    return "gpt" if config.model.family == "gpt" else "bert"


def words_of(example: Example) -> list[str]:
    """The words of an example, between white space; those of a pair with a separator between them."""
    if isinstance(example, Tagged):
        return list(example.words)
    assert isinstance(example, Sentences)  # questions have no words: `loading.preflight` refuses them
    second = [] if example.second is None else [SEPARATOR, *example.second.split()]
    return [*example.text.split(), *second]


def encode(config: Config, vocabulary: Tokenizer | Vocabulary, examples: Sequence[Example]) -> Encoded:
    """Examples of config.task.set, cut and padded to data.sequence_length."""
    chosen, length = SETS[config.task.set or ""], config.data.sequence_length
    labels = tags_of(chosen.labels, config.task.scheme)
    if isinstance(vocabulary, Vocabulary):
        return _of_words(config, vocabulary, examples, chosen, labels)
    pad = vocabulary.pad if vocabulary.pad is not None else 0
    if chosen.kind == "answer":
        questions = [one for one in examples if isinstance(one, Question)]
        windows = windows_of(vocabulary, questions, length, config.task.stride)
        arrays = _tokens([w.ids for w in windows], length, pad, [w.token_types for w in windows])
        arrays["answerable"] = _padded([w.offsets[:, 0] >= 0 for w in windows], length, 0).astype(bool)
        arrays["answerable"][:, 0] = True
        known = np.array([bool(questions[w.question].answers) for w in windows])
        targets = np.array([(w.start, w.end) for w in windows], np.int64).reshape(-1, 2)
        return Encoded({**arrays, "targets": np.where(known[:, None], targets, IGNORED)}, [], windows)
    if chosen.kind == "tag":
        tagged = [_in_scheme(one, config.task.scheme) for one in examples if isinstance(one, Tagged)]
        found = encode_tagged(vocabulary, tagged, labels, length, form_of(config))
        arrays = _tokens([one.ids for one in found], length, pad, [one.token_types for one in found])
        targets = _padded([one.labels for one in found], length, IGNORED)
        return Encoded({**arrays, "targets": targets}, [one.first for one in found], [])
    sentences = [one for one in examples if isinstance(one, Sentences)]
    texts = encode_sentences(vocabulary, sentences, length, form_of(config))
    arrays = _tokens([one.ids for one in texts], length, pad, [one.token_types for one in texts])
    return Encoded({**arrays, "targets": _labels(sentences, labels, chosen)}, [], [])


def _of_words(config: Config, vocabulary: Vocabulary, examples: Sequence[Example], chosen: LabelledSet,
              labels: Sequence[str]) -> Encoded:  # fmt: skip
    length = config.data.sequence_length
    texts = [words_of(one)[:length] for one in examples]
    arrays = _tokens([vocabulary.encode(words) for words in texts], length, 0, None)
    if config.model.character_size:
        arrays["characters"] = _characters(texts, length, config.task.max_characters)
    if chosen.kind != "tag":
        sentences = [one for one in examples if isinstance(one, Sentences)]
        return Encoded({**arrays, "targets": _labels(sentences, labels, chosen)}, [], [])
    numbers = {label: i for i, label in enumerate(labels)}
    tags = [np.array([numbers[tag] for tag in _in_scheme(one, config.task.scheme).tags[:length]], np.int64)
            for one in examples if isinstance(one, Tagged)]  # fmt: skip
    places = [np.where(np.arange(len(words_of(one))) < length, np.arange(len(words_of(one))), -1) for one in examples]
    return Encoded({**arrays, "targets": _padded(tags, length, IGNORED)}, places, [])


def _in_scheme(example: Tagged, scheme: str) -> Tagged:
    return example if scheme == "iob2" else Tagged(example.words, tuple(to_bioes(example.tags)))


def _labels(examples: Sequence[Sentences], labels: Sequence[str], chosen: LabelledSet) -> np.ndarray:
    if chosen.kind == "regress":
        return np.array([IGNORED if one.label is None else one.label for one in examples], np.float32)
    numbers = {label: i for i, label in enumerate(labels)}
    return np.array([IGNORED if one.label is None else numbers[str(one.label)] for one in examples], np.int64)


def _tokens(ids: list[np.ndarray], length: int, pad: int, types: list[np.ndarray] | None) -> Arrays:
    lengths = np.array([max(1, len(row)) for row in ids])[:, None]  # an empty text is one token of padding
    mask = np.arange(length)[None] < lengths
    empty = np.zeros((len(ids), length), np.int64)
    kinds = empty if types is None else _padded(types, length, 0)
    return {"tokens": _padded(ids, length, pad), "token_types": kinds, "attention_mask": mask}


def _padded(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    found = np.full((len(rows), length), value, np.int64)
    for into, row in zip(found, rows, strict=True):
        into[: min(length, len(row))] = row[:length]
    return found


def _characters(texts: list[list[str]], length: int, longest: int) -> np.ndarray:
    found = np.zeros((len(texts), length, longest), np.uint8)
    for into, words in zip(found, texts, strict=True):
        for place, word in enumerate(words):
            spelled = np.frombuffer(word.encode()[:longest], np.uint8)
            into[place, : len(spelled)] = spelled
    return found
