"""Word vectors in word2vec's text format (numpy; no torch).

The text format: a line `V H`, then for each word the word and its H numbers, separated by single spaces.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.folders import write_atomically

VECTORS = "vectors.txt"
CONFIG = "config.yaml"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Vectors:
    """Words and their vectors."""

    words: tuple[str, ...]
    """[V]."""
    values: np.ndarray
    """float32 [V, H]."""


def write_vectors(path: Path, vectors: Vectors) -> None:
    """Write the text format, with nine digits, which give float32 numbers back exactly."""
    lines = [f"{len(vectors.words)} {vectors.values.shape[1]}"]
    for word, row in zip(vectors.words, vectors.values.tolist(), strict=True):
        lines.append(f"{word} {' '.join(f'{x:.9g}' for x in row)}")
    write_atomically(path, "\n".join(lines) + "\n")


def read_vectors(path: Path) -> Vectors:
    """Read the text format, this project's or another's; GloVe's files, which lack the first line, too.

    Raises RefusedInput where the file is missing, or a line does not hold a word and as many numbers as the others.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RefusedInput([_problem(path, f"it cannot be read: {error.strerror}")]) from error
    first = lines[0].split()
    counted = len(first) == 2 and all(word.isdecimal() for word in first)
    words, rows = [], []
    for number, line in enumerate(lines[counted:], start=1 + counted):
        if not line:
            continue
        word, *texts = line.rstrip().split(" ")
        row = np.array(texts, dtype=object)
        try:
            row = row.astype(np.float32)
        except ValueError:
            raise RefusedInput([_problem(path, f"line {number} does not hold a word and numbers")]) from None
        wanted = len(rows[0]) if rows else max(1, len(row))
        if len(row) != wanted:
            raise RefusedInput([_problem(path, f"line {number} has {len(row)} numbers, others {wanted}")])
        words.append(word)
        rows.append(row)
    if counted and [str(len(words)), str(len(rows[0]) if rows else 0)] != first:
        raise RefusedInput([_problem(path, f"the first line promises {' x '.join(first)} numbers: it is cut off")])
    if not words:
        raise RefusedInput([_problem(path, "it holds no vectors")])
    return Vectors(tuple(words), np.stack(rows))


def _problem(path: Path, message: str) -> Problem:
    return Problem((str(path),), message, "give a file in word2vec's text format")
