"""Huffman's tree: a small one by hand, and what makes any of them right."""

import heapq

import numpy as np
import pytest

from disttrain.vectors.huffman import huffman_paths


def test_by_hand() -> None:
    # counts 5 3 1 1: {2, 3} -> node 0 (2), {0, 1} = node 0 and word 1 -> node 1 (5), {word 0, node 1} -> node 2, the root
    nodes, turns = huffman_paths(np.array([5, 3, 1, 1]))
    assert nodes.tolist() == [[2, -1, -1], [2, 1, -1], [2, 1, 0], [2, 1, 0]]
    assert turns.tolist() == [[False, False, False], [True, True, False], [True, False, False], [True, False, True]]


@pytest.mark.parametrize("words", [2, 3, 17, 200])
def test_codes_are_prefix_free_and_as_short_as_can_be(words: int) -> None:
    counts = np.sort(np.random.default_rng(words).integers(1, 1000, words))[::-1]
    nodes, turns = huffman_paths(counts)
    lengths = (nodes >= 0).sum(1)
    codes = {"".join(map(str, turns[w, :n].astype(int))) for w, n in enumerate(lengths)}
    assert len(codes) == words
    assert (2.0**-lengths).sum() == 1.0  # Kraft: together with the next line, no code begins another
    assert not any(a != b and b.startswith(a) for a in codes for b in codes)
    heap, cost = counts.tolist(), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    assert (counts * lengths).sum() == cost
    assert set(nodes[nodes >= 0]) == set(range(words - 1))


def test_one_word_is_no_tree() -> None:
    with pytest.raises(ValueError, match="two words"):
        huffman_paths(np.array([3]))
