"""Huffman's binary tree over the vocabulary, for hierarchical softmax (Mikolov et al. 2013b, section 2.1). No torch."""

import heapq

import numpy as np


def huffman_paths(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each word's way from the root of the tree that makes frequent words' ways short (Huffman 1952).

    counts is int64 [V], V at least 2. Returns (inner nodes, int64 [V, L], filled up with -1; whether the way goes to the
    second child there, bool [V, L]), with L the longest way. The V - 1 inner nodes have the numbers 0 to V - 2, the root
    the last; of two subtrees the one with the smaller count, or the older one, is the first child. Raises ValueError for
    fewer than two words.
    """
    words = len(counts)
    if words < 2:
        raise ValueError("a tree needs two words")
    parent = np.zeros(2 * words - 1, dtype=np.int64)
    second = np.zeros(2 * words - 1, dtype=bool)
    heap = [(int(count), number) for number, count in enumerate(counts)]
    heapq.heapify(heap)
    for inner in range(words, 2 * words - 1):
        (low, first), (high, other) = heapq.heappop(heap), heapq.heappop(heap)
        parent[first] = parent[other] = inner
        second[other] = True
        heapq.heappush(heap, (low + high, inner))
    ways = [_way(word, parent, second, root=2 * words - 2) for word in range(words)]
    longest = max(map(len, ways))
    nodes = np.full((words, longest), -1, dtype=np.int64)
    turns = np.zeros((words, longest), dtype=bool)
    for word, way in enumerate(ways):
        nodes[word, : len(way)] = [node - words for node, _ in way]
        turns[word, : len(way)] = [turn for _, turn in way]
    return nodes, turns


def _way(word: int, parent: np.ndarray, second: np.ndarray, root: int) -> list[tuple[int, bool]]:
    """(inner node, whether the second child is taken) from the root down."""
    way, node = [], word
    while node != root:
        way.append((int(parent[node]), bool(second[node])))
        node = int(parent[node])
    return way[::-1]
