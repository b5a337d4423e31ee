"""Vocabularies of words and of characters, and vectors for them from a file (numpy)."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.folders import write_atomically
from disttrain.labelled.files import bad_line, lines_of, refuse

PAD, UNKNOWN = 0, 1
SPECIALS = ("PAD", "UNK")
"""Names of the ids 0 and 1; a word of this spelling has this id."""


@dataclass(frozen=True)
class Vocabulary:
    """Words, or characters, by id."""

    words: tuple[str, ...]
    """The first two are those of `SPECIALS`."""
    ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Number the words. Raises ValueError when two are equal or the first two are others."""
        object.__setattr__(self, "ids", {word: i for i, word in enumerate(self.words)})
        if self.words[:2] != SPECIALS or len(self.ids) != len(self.words):
            raise ValueError(f"a vocabulary starts with {SPECIALS} and has no word twice")

    def __len__(self) -> int:
        """Number of words, PAD and UNK among them."""
        return len(self.words)

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """Ids (int64) of words; 1 for those that the vocabulary lacks."""
        return np.array([self.ids.get(word, UNKNOWN) for word in words], dtype=np.int64)


def build_vocabulary(texts: Iterable[Iterable[str]], min_count: int = 1, max_size: int | None = None) -> Vocabulary:
    """The words of the training texts, the most frequent first and equally frequent ones by code points.

    min_count: how often a word occurs at least. max_size: how many words, PAD and UNK among them, at most. For
    characters give words in place of texts: a word is a sequence of characters.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted((word for word, count in counts.items() if count >= min_count and word not in SPECIALS),
                    key=lambda word: (-counts[word], word))  # fmt: skip
    return Vocabulary((*SPECIALS, *ranked)[:max_size])


def encode_characters(words: Sequence[str], characters: Vocabulary, longest: int) -> np.ndarray:
    """Ids (int64) of the first characters of each word, PAD behind them: (words, longest)."""
    found = np.full((len(words), longest), PAD, dtype=np.int64)
    for row, word in enumerate(words):
        ids = characters.encode(word[:longest])
        found[row, : len(ids)] = ids
    return found


def padded(sequences: Sequence[np.ndarray], longest: int | None = None, value: int = PAD) -> np.ndarray:
    """Sequences of ids as one matrix (int64), value behind the short ones; longest cuts them."""
    length = max((len(ids) for ids in sequences), default=0)
    length = length if longest is None else min(length, longest)
    found = np.full((len(sequences), length), value, dtype=np.int64)
    for row, ids in enumerate(sequences):
        found[row, : len(ids)] = ids[:length]
    return found


def save_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Write the words by id as JSON, the file whole or not at all."""
    write_atomically(path, json.dumps({"words": vocabulary.words}, ensure_ascii=False, indent=0) + "\n")


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what `save_vocabulary` wrote. Raises RefusedInput when the file is missing or is none."""
    try:
        return Vocabulary(tuple(json.loads("\n".join(lines_of(path)))["words"]))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RefusedInput):
            raise
        problem = Problem((str(path),), f"the file is not a vocabulary: {error}", "write it again")
        raise RefusedInput([problem]) from error


@dataclass(frozen=True)
class Vectors:
    """A vector for each word of a vocabulary."""

    matrix: np.ndarray
    """float32, (words, dimensions). PAD's row is zero."""
    found: int
    """Words whose vector the file has, in their own or in lower case."""


def read_vectors(path: Path, vocabulary: Vocabulary, seed: int) -> Vectors:
    """Vectors of a text file as GloVe and word2vec write them: a word and its numbers a line.

    A first line of two whole numbers (word2vec's: words and dimensions) is skipped. A word may hold spaces. A word that
    the file lacks takes the vector of its lower case, or one drawn uniformly from [-0.25, 0.25) (Kim 2014, section
    3.1). Raises RefusedInput, with file and line, for a line with another number of dimensions or with what is no number.
    """
    lines = lines_of(path)
    first = 1 if lines and len(lines[0].split()) == 2 and all(part.isdigit() for part in lines[0].split()) else 0
    if first == len(lines):
        raise RefusedInput([Problem((str(path),), "there are no vectors in it", "give a file of vectors")])
    dimensions = int(lines[0].split()[1]) if first else len(lines[0].rstrip(" ").split(" ")) - 1
    wanted = set(vocabulary.words[2:]) | {word.lower() for word in vocabulary.words[2:]}
    vectors: dict[str, np.ndarray] = {}
    problems: list[Problem] = []
    for number, line in enumerate(lines[first:], first + 1):
        word, *values = line.rstrip(" ").rsplit(" ", dimensions)
        if len(values) != dimensions:
            problems.append(bad_line(path, number, f"the line has no {dimensions} numbers", "correct the line"))
        elif word in wanted and word not in vectors:
            try:
                vectors[word] = np.array(values, dtype=np.float32)
            except ValueError as error:
                problems.append(bad_line(path, number, f"this is no number: {error}", "correct the line"))
    refuse(problems, path)
    matrix = np.random.default_rng(seed).uniform(-0.25, 0.25, (len(vocabulary), dimensions)).astype(np.float32)
    matrix[PAD] = 0
    found = 0
    for row, word in enumerate(vocabulary.words[2:], 2):
        vector = vectors.get(word, vectors.get(word.lower()))
        if vector is not None:
            matrix[row] = vector
            found += 1
    return Vectors(matrix, found)
