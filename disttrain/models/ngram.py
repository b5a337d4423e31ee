"""Interpolated Kneser-Ney n-gram language model over integer token ids: the baseline a trained network must beat.

Kneser and Ney, "Improved backing-off for m-gram language modeling" (ICASSP 1995); interpolated and modified form:
Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999). With h a context of k-1
tokens, h' the same without its first token, c the count of order k and D the absolute discount,

    P_k(w | h) = (c(hw) - D(c(hw))) / sum_v c(hv) + gamma(h) * P_{k-1}(w | h'),    P_0(w) = 1 / vocab_size,

where gamma(h) is the mass that the discounts took from h, so that P_k sums to one. The highest order counts
occurrences; every lower order counts the distinct tokens seen before the n-gram (its continuation count; the start of
the stream counts as one such token).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length k, numbered 0, 1, ... in ascending order of their keys.

    A key is ``number of the (k-1)-gram before the last token * vocab_size + last token``, so it fits 64 bits for any
    order. The last entry of `share` and `backoff` answers index -1: an n-gram, or a context, that was never seen.
    """

    keys: np.ndarray
    """int64 [grams], ascending."""
    share: np.ndarray
    """float64 [grams + 1]: (c - D(c)) / total count of the context."""
    backoff: np.ndarray
    """float64 [contexts + 1]: weight gamma of the next lower order, by number of the (k-1)-gram."""


class KneserNey:
    """A fitted model; make one with `fit`. The token stream is one sequence: n-grams cross document separators."""

    def __init__(self, levels: list[_Level], vocab_size: int):
        self._levels = levels
        self.vocab_size = vocab_size

    @property
    def order(self) -> int:
        """Tokens of the longest n-gram: the model sees order - 1 tokens of context."""
        return len(self._levels)

    @property
    def gram_counts(self) -> list[int]:
        """Distinct n-grams stored, shortest first."""
        return [len(level.keys) for level in self._levels]

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int, order: int = 3, modified: bool = True) -> "KneserNey":
        """Count the n-grams of `tokens` (integers [n] below vocab_size) and estimate the discounts.

        `modified` takes three discounts an order (counts 1, 2, and 3 or more) and falls back to the single
        n1 / (n1 + 2 n2) in an order whose counts of counts cannot give them. Takes about 20 bytes a token and order
        while fitting. Raises ValueError for an order below 1, ids outside the vocabulary, or a vocabulary so large that
        (distinct n-grams x vocab_size) passes 2^63.
        """
        if order < 1:
            raise ValueError(f"order={order} is below 1")
        stream = _checked(tokens, vocab_size)
        passes = _number(stream, vocab_size, order)
        levels = []
        contexts = 1  # the empty one
        for k, grams in enumerate(passes):
            counts = _continuations(grams, passes[k + 1]) if k + 1 < order else grams.occurrences
            levels.append(_level(grams.keys, counts, contexts, vocab_size, modified))
            contexts = len(grams.keys)
        return cls(levels, vocab_size)

    def log_probabilities(self, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """Natural log of P(tokens[p] | the order - 1 tokens before p) for each p in `positions` (all when None).

        `tokens` is integers [n], `positions` integers [m] from 0 to n - 1; returns float64 [m]. A position with fewer
        than order - 1 tokens before it is scored by the lower order. Raises ValueError for ids outside the vocabulary
        and positions outside the tokens.
        """
        stream = _checked(tokens, self.vocab_size)
        if positions is None:
            return np.log(self._probabilities(stream))
        positions = np.asarray(positions)
        if positions.size == 0:
            return np.empty(0)
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last >= len(stream):
            raise ValueError(f"positions {first} to {last} are outside the {len(stream)} tokens")
        start = max(0, first - self.order + 1)
        return np.log(self._probabilities(stream[start : last + 1])[positions - start])

    def cross_entropy(self, tokens: np.ndarray, positions: np.ndarray | None = None) -> float:
        """Mean of -log P over the target `positions` (all when None), nats per token. Raises as log_probabilities."""
        scores = self.log_probabilities(tokens, positions)
        if scores.size == 0:
            raise ValueError("no target positions: the cross-entropy of nothing is undefined")
        return float(-scores.mean())

    def _probabilities(self, stream: np.ndarray) -> np.ndarray:
        """P of every token of `stream` given what precedes it in `stream`, float64 [n]."""
        probability = np.full(len(stream), 1.0 / self.vocab_size)
        context = np.zeros(len(stream), dtype=np.int64)  # number of the n-gram that ends just before each token
        for level in self._levels:
            wanted = context * self.vocab_size + stream
            number = np.searchsorted(level.keys, wanted)
            number[number == len(level.keys)] = 0
            seen = level.keys[number] == wanted if len(level.keys) else np.zeros(len(stream), dtype=bool)
            number[~seen | (context < 0)] = -1
            probability = level.share[number] + level.backoff[context] * probability
            context = np.concatenate(([-1], number[:-1])) if len(stream) else number
        return probability


@dataclass(frozen=True)
class _Grams:
    """The distinct n-grams of one length in the stream, by ascending key."""

    keys: np.ndarray
    """int64 [grams]."""
    first: np.ndarray
    """int64 [grams]: window of the first occurrence."""
    occurrences: np.ndarray
    """int64 [grams]."""
    numbers: np.ndarray
    """int64 [windows]: which n-gram each window of the stream is."""


def _checked(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """`tokens` as int64 [n]; ValueError unless they are one row of ids from 0 to vocab_size - 1."""
    stream = np.asarray(tokens)
    if stream.ndim != 1 or (stream.size and not np.issubdtype(stream.dtype, np.integer)):
        raise ValueError(f"tokens must be one row of integers, got shape {stream.shape} of {stream.dtype}")
    if stream.size and (stream.min() < 0 or stream.max() >= vocab_size):
        raise ValueError(f"token ids {stream.min()} to {stream.max()} are outside the vocabulary of {vocab_size}")
    return stream.astype(np.int64)


def _number(stream: np.ndarray, vocab_size: int, order: int) -> list[_Grams]:
    """Number the n-grams of each length 1 to order."""
    passes: list[_Grams] = []
    context = np.zeros(len(stream), dtype=np.int64)  # of each window, what precedes its last token
    contexts = 1
    for length in range(1, order + 1):
        if contexts * vocab_size > np.iinfo(np.int64).max:
            raise ValueError(f"vocab_size={vocab_size} with {contexts} distinct {length - 1}-grams passes 2^63")
        windows = context * vocab_size + stream[length - 1 :]
        keys, first, numbers, occurrences = np.unique(
            windows, return_index=True, return_inverse=True, return_counts=True
        )
        passes.append(_Grams(keys, first, occurrences, numbers))
        context, contexts = numbers[:-1], len(keys)
    return passes


def _continuations(grams: _Grams, longer: _Grams) -> np.ndarray:
    """Distinct left neighbours of each n-gram, int64 [grams]; the start of the stream is one."""
    # Window i of the longer n-grams ends with window i + 1 of these; one window of each distinct longer n-gram will do.
    counts = np.bincount(grams.numbers[1:][longer.first], minlength=len(grams.keys))
    counts[grams.numbers[:1]] += 1
    return counts


def _discounts(counts: np.ndarray, modified: bool) -> np.ndarray:
    """Discounts of counts 0, 1, 2, and 3 or more, float64 [4], each at most its count (Chen and Goodman, eq. 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    # Without n-grams of count 1 nothing can be estimated, and a discount of 0 would leave unseen tokens no mass.
    single = n1 / (n1 + 2 * n2) if n1 else 0.5
    if modified and n1 and n2 and n3:
        three = np.array([0, 1 - 2 * single * n2 / n1, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3])
        if np.all(three[1:] > 0):
            return three
    return np.array([0, single, single, single])


def _level(keys: np.ndarray, counts: np.ndarray, contexts: int, vocab_size: int, modified: bool) -> _Level:
    """Discounted shares and back-off weights of one order; an n-gram's context is keys // vocab_size."""
    discount = _discounts(counts, modified)[np.minimum(counts, 3)]
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=contexts)
    taken = np.bincount(context, weights=discount, minlength=contexts)
    backoff = np.ones(contexts + 1)  # 1: a context with no successor leaves all to the lower order
    np.divide(taken, total, out=backoff[:-1], where=total > 0)
    share = np.zeros(len(keys) + 1)
    share[:-1] = (counts - discount) / total[context]
    return _Level(keys, share, backoff)
