"""Orders without memory: a pseudo-random permutation by Feistel network, and blending in blocks."""

from dataclasses import dataclass
from math import gcd

import numpy as np

BLOCK = 1000
"""Blend weights are rounded to this many parts."""

_ROUNDS = 6
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where each index of range(size) goes in the pseudo-random permutation named by key (non-negative integers).

    A balanced Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds size, walked
    until the value is below size (Black and Rogaway 2002): a bijection in constant memory, so a run can ask for
    sample 10^9 without shuffling anything. index and result: int64 of any shape.
    """
    if size < 1 or (index.size and (index.min() < 0 or index.max() >= size)):
        raise ValueError(f"index out of range({size})")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    value = index.astype(np.uint64).reshape(-1)
    walking = np.arange(value.size)
    while walking.size:
        value[walking] = _feistel(value[walking], half, mask, round_keys)
        walking = walking[value[walking] >= size]
    return value.astype(np.int64).reshape(index.shape)


def _feistel(value: np.ndarray, half: np.uint64, mask: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    left, right = value >> half, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014); uint64 arithmetic wraps."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def quotas(weights: list[float]) -> list[int]:
    """Whole parts of each source in a block, by the largest remainder of weights rounded to 1/1000, reduced.

    A weight below half a thousandth may get 0 parts: it would never be seen (`preflight` refuses it).
    """
    total = sum(weights)
    shares = [w / total * BLOCK for w in weights]
    parts = [int(s) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (parts[i] - shares[i], i))
    for i in by_remainder[: BLOCK - sum(parts)]:
        parts[i] += 1
    divisor = gcd(*parts)
    return [p // divisor for p in parts]


@dataclass(frozen=True)
class Blend:
    """Which source each sample of a run comes from: exact quotas in every block, in a fixed pseudo-random order."""

    parts: tuple[int, ...]
    key: tuple[int, ...]

    def locate(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and position within that source's own stream of samples, for int64 samples of shape [n].

        Every position of a source's stream is met exactly once, whatever the weights.
        """
        if len(self.parts) == 1:
            return np.zeros_like(sample), sample
        length = sum(self.parts)
        starts = np.concatenate([[0], np.cumsum(self.parts)])
        block, place = sample // length, sample % length
        for number in np.unique(block):
            here = block == number
            place[here] = permute(place[here], length, (*self.key, int(number)))
        source = np.searchsorted(starts, place, side="right") - 1
        return source, block * np.asarray(self.parts)[source] + place - starts[source]
