"""GPT's sequences: consecutive tokens of the whole corpus, documents one after the other (packing)."""

import numpy as np

from disttrain.data.shards import TokenSet


def sequences(tokens: int, length: int) -> int:
    """How many sequences a number of tokens gives: each needs one token more than its length, for the last target."""
    return max(0, (tokens - 1) // length)


def batch(samples: list[tuple[TokenSet, int]], length: int) -> dict[str, np.ndarray]:
    """`tokens` and `targets` (int64 [len(samples), length]) of (token set, sequence number) pairs.

    Sequence j is tokens j*length .. (j+1)*length of the set, its targets the same one further.
    """
    rows = np.empty((len(samples), length + 1), np.int64)
    for row, (tokens, number) in zip(rows, samples, strict=True):
        row[:] = tokens.read(number * length, number * length + length + 1)
    return {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}
