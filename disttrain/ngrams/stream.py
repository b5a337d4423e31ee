"""Text files as one row of token ids, for n-gram models (numpy; no torch)."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.ngrams.schema import NgramConfig

BYTES = 256


@dataclass(frozen=True)
class Stream:
    """The tokens of some files, in order."""

    tokens: np.ndarray
    """int32 [n], uint8 for bytes."""
    words: int
    """What white space separates; the ends of lines do not count."""
    unknown: int
    """Words that are not in the vocabulary."""


def make_vocabulary(files: Sequence[Path], config: NgramConfig) -> dict[str, int] | None:
    """Number the words that occur min_count times, the unknown word and the end of a line; None for bytes."""
    if config.unit == "bytes":
        return None
    counter: Counter[str] = Counter()
    for line in _lines(files, config.lowercase):
        counter.update(line)
    words = sorted(word for word, count in counter.items() if count >= config.min_count)
    return {word: number for number, word in enumerate(dict.fromkeys([config.unknown, config.end, *words]))}


def read_stream(files: Sequence[Path], config: NgramConfig, vocabulary: dict[str, int] | None) -> Stream:
    """Number the tokens of some files; every line of words is followed by its end."""
    if vocabulary is None:
        text = b"".join(file.read_bytes() for file in files)
        return Stream(np.frombuffer(text, dtype=np.uint8), len(text.split()), 0)
    unknown, end = vocabulary[config.unknown], vocabulary[config.end]
    tokens, words, missing = array("i"), 0, 0
    for line in _lines(files, config.lowercase):
        words += len(line)
        missing += sum(word not in vocabulary for word in line)
        tokens.extend(vocabulary.get(word, unknown) for word in line)
        tokens.append(end)
    return Stream(np.asarray(tokens, dtype=np.int32), words, missing)


def _lines(files: Iterable[Path], lowercase: bool) -> Iterator[list[str]]:
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as text:
            for line in text:
                yield (line.lower() if lowercase else line).split()
