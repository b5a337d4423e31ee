"""Huffman coding (Huffman 1952) of small whole numbers, exactly, and decoded many at a time.

Codes are canonical: the lengths say them all. Symbols are coded in blocks whose first bits are known, and one symbol of
every block is decoded at once. Words are read as 64 bits from a byte on, so that codes have at most 57 bits: a longer one
takes more symbols than any model has weights.
"""

import heapq
from dataclasses import dataclass

import numpy as np

BLOCK = 1024
"""Symbols of a block."""
LONGEST = 57


@dataclass(frozen=True)
class Coded:
    """What is on disk."""

    data: np.ndarray
    """uint8 [bytes]: the codes one after the other, the first bit of a byte being its highest."""
    lengths: np.ndarray
    """uint8 [symbols there could be]: bits of each one's code, 0 of what does not occur."""
    blocks: np.ndarray
    """uint32 or uint64 [blocks]: the bit at which each block begins."""
    count: int
    """Symbols."""

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.data.nbytes + self.lengths.nbytes + self.blocks.nbytes


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """uint8: bits of each symbol's code, from how often each occurs (int64 [symbols]); the sum of counts x bits is least.

    A symbol that is alone gets one bit. Raises ValueError for a code of more than 57 bits.
    """
    there = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    if len(there) == 1:
        lengths[there] = 1
        return lengths
    heap: list[tuple[int, int, tuple[int, ...]]] = [(int(counts[s]), int(s), (int(s),)) for s in there]
    heapq.heapify(heap)
    made = len(counts)
    while len(heap) > 1:
        (one, _, left), (other, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        below = left + right
        lengths[list(below)] += 1
        heapq.heappush(heap, (one + other, made, below))
        made += 1
    if lengths.max(initial=0) > LONGEST:
        raise ValueError(f"a code of {lengths.max()} bits: only {LONGEST} can be read")
    return lengths


def canonical(lengths: np.ndarray) -> np.ndarray:
    """uint64 [symbols]: the code of each symbol, in its lowest bits; shorter ones first, of one length by symbol."""
    codes = np.zeros(len(lengths), np.uint64)
    code, before = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            code <<= length - before
            codes[symbol], before = code, length
            code += 1
    return codes


def encode(symbols: np.ndarray, alphabet: int) -> Coded:
    """Code symbols (whole numbers [N] from 0 to alphabet - 1)."""
    symbols = symbols.astype(np.int64)
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    codes, each = canonical(lengths), lengths[symbols].astype(np.int64)
    ends = np.cumsum(each)
    starts = ends - each
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    words = codes[symbols]
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(each > place)
        down = (each[longer] - 1 - place).astype(np.uint64)
        bits[starts[longer] + place] = (words[longer] >> down) & np.uint64(1)
    wide = np.uint32 if len(bits) < 1 << 32 else np.uint64
    return Coded(np.packbits(bits), lengths, starts[::BLOCK].astype(wide), len(symbols))


def decode(coded: Coded) -> np.ndarray:
    """int64 [N]: the symbols. Raises ValueError where the bits are no codes of theirs."""
    lengths = coded.lengths.astype(np.int64)
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    if not len(order):
        if coded.count:
            raise ValueError("there are symbols, and no codes")
        return np.zeros(0, np.int64)
    sizes = lengths[order]
    first = canonical(coded.lengths)[order] << (np.uint64(64) - sizes.astype(np.uint64))
    data = np.concatenate([coded.data, np.zeros(8, np.uint8)])
    position = coded.blocks.astype(np.int64)
    found = np.zeros((len(position), BLOCK), np.int64)
    for place in range(min(BLOCK, coded.count)):
        live = len(position) if place < (coded.count - 1) % BLOCK + 1 else len(position) - 1
        at = position[:live]
        if live and (at.max() >> 3) + 8 > len(data):
            raise ValueError("the codes end before the symbols do")
        number = np.searchsorted(first, _words(data, at), side="right") - 1
        found[:live, place] = order[number]
        position[:live] = at + sizes[number]
    return found.reshape(-1)[: coded.count]


def _words(data: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """uint64: what begins at each of these bits, at least 57 of it, in the highest."""
    byte = bits >> 3
    word = np.zeros(len(bits), np.uint64)
    for number in range(8):
        word = (word << np.uint64(8)) | data[byte + number].astype(np.uint64)
    return word << (bits & 7).astype(np.uint64)
