"""A text as numbers of its words, and the vocabulary they come from (numpy; no torch).

Shapes: N words of the text, V vocabulary.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.data.items import expand
from disttrain.vectors.schema import VectorsConfig


@dataclass(frozen=True)
class Corpus:
    """The words of a text that are in its vocabulary."""

    words: tuple[str, ...]
    """[V], the most frequent first, equally frequent ones by their letters."""
    counts: np.ndarray
    """int64 [V]: how often each word occurs."""
    tokens: np.ndarray
    """int32 [N]: numbers of the words, in the order of the text."""
    lines: np.ndarray
    """int32 [N]: the line each stands in."""
    read: int
    """Words of the text, those that were left out included."""


def text_files(config: VectorsConfig) -> tuple[list[Path], list[Problem]]:
    """The files that a config names, and what is wrong with them."""
    return expand(config.path, "file", "path")


def read_corpus(config: VectorsConfig) -> Corpus:
    """Read a config's text twice: to count, and to number.

    Raises RefusedInput where files are missing or cannot be read, and where fewer than two words are frequent enough.
    """
    files, problems = text_files(config)
    if problems:
        raise RefusedInput(problems)
    counter: Counter[str] = Counter()
    for line in _lines(files, config.lowercase):
        counter.update(line)
    kept = {w: n for w, n in counter.items() if n >= config.min_count and w != config.unknown}
    if len(kept) < 2:
        setting = (f"min_count={config.min_count}",)
        message = f"{len(kept)} of the {len(counter)} different words of the text occur so often"
        raise RefusedInput([Problem(setting, message, "give a smaller min_count or more text")])
    words = tuple(sorted(kept, key=lambda word: (-kept[word], word)))
    counts = np.array([kept[word] for word in words], dtype=np.int64)
    return Corpus(words, counts, *_numbered(files, config.lowercase, words), counter.total())


def _numbered(files: Sequence[Path], lowercase: bool, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(number of each word, number of its line), both int32 [N]."""
    numbers = {word: number for number, word in enumerate(words)}
    tokens, lengths = array("i"), array("i")
    for line in _lines(files, lowercase):
        known = [numbers[word] for word in line if word in numbers]
        tokens.extend(known)
        lengths.append(len(known))
    lines = np.repeat(np.arange(len(lengths), dtype=np.int32), np.asarray(lengths))
    return np.asarray(tokens, dtype=np.int32), lines


def _lines(files: Sequence[Path], lowercase: bool) -> Iterator[list[str]]:
    """The words of each line; bytes that are not UTF-8 become the replacement character."""
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as text:
            for line in text:
                yield (line.lower() if lowercase else line).split()
