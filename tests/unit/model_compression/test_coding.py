"""Huffman codes and matrices of few values: exact round trips, the textbook's lengths, Lloyd against a plain loop."""

import heapq

import numpy as np
import pytest
import torch

from disttrain.model_compression import deep, huffman
from disttrain.model_compression.kmeans import Shared, cluster, finetune
from tests.unit.model_compression.test_structured import batch_of, model_of


def test_lengths_of_a_known_example() -> None:
    """Cormen et al., "Introduction to Algorithms", section 16.3: a:45 b:13 c:12 d:16 e:9 f:5 take 224 bits."""
    counts = np.array([45, 13, 12, 16, 9, 5])
    lengths = huffman.code_lengths(counts)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    assert int(counts @ lengths) == 224
    assert huffman.canonical(lengths).tolist() == [0b0, 0b100, 0b101, 0b110, 0b1110, 0b1111]


def test_codes_are_the_shortest_and_say_their_bits() -> None:
    """Against the sum of all merged weights, which is the cost of a Huffman tree."""
    generator = np.random.default_rng(0)
    symbols = np.minimum(generator.geometric(0.2, 5000) - 1, 40)
    counts = np.bincount(symbols)
    heap, cost = sorted(int(n) for n in counts if n), 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    coded = huffman.encode(symbols, len(counts))
    assert len(coded.data) == -(-cost // 8)
    entropy = -sum(n / 5000 * np.log2(n / 5000) for n in counts if n)
    assert entropy <= cost / 5000 < entropy + 1


@pytest.mark.parametrize("size", [0, 1, 2, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("alphabet", [1, 2, 32, 300])
def test_decoding_gives_the_symbols_back(size: int, alphabet: int) -> None:
    symbols = np.random.default_rng(size).integers(0, alphabet, size)
    assert np.array_equal(huffman.decode(huffman.encode(symbols, alphabet)), symbols)


def test_codes_of_many_lengths() -> None:
    """Fibonacci's numbers make the longest codes."""
    numbers = [1, 1]
    while len(numbers) < 22:
        numbers.append(numbers[-1] + numbers[-2])
    symbols = np.random.default_rng(1).permutation(np.repeat(np.arange(22), numbers))
    coded = huffman.encode(symbols, 22)
    assert coded.lengths.max() == 21
    assert np.array_equal(huffman.decode(coded), symbols)


def test_damaged_codes_are_told() -> None:
    coded = huffman.encode(np.arange(100) % 7, 7)
    with pytest.raises(ValueError, match="end before"):
        huffman.decode(huffman.Coded(coded.data[:4], coded.lengths, coded.blocks, coded.count))
    with pytest.raises(ValueError, match="no codes"):
        huffman.decode(huffman.Coded(coded.data, np.zeros(7, np.uint8), coded.blocks, coded.count))


def lloyd(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The plain loop."""
    while True:
        nearest = np.abs(values[:, None] - centroids[None]).argmin(1)
        moved = np.array([values[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centroids)])
        if np.allclose(moved, centroids, rtol=1e-12, atol=1e-14):
            return moved
        centroids = moved


def test_clusters_are_lloyds() -> None:
    weights = np.random.default_rng(2).normal(size=(40, 25)).astype(np.float32)
    shared = cluster(weights, 8, keep_zeros=False)
    flat = weights.astype(np.float64).ravel()
    expected = lloyd(flat, np.linspace(flat.min(), flat.max(), 8))
    np.testing.assert_allclose(shared.codebook, expected, rtol=1e-6)
    nearest = np.abs(flat[:, None] - expected[None]).argmin(1).reshape(40, 25)
    assert np.array_equal(shared.codes, nearest)
    assert torch.equal(shared.values, torch.from_numpy(shared.codebook[nearest]))


def test_clusters_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    weights = np.random.default_rng(3).normal(size=(30, 20)).astype(np.float32)
    flat = weights.astype(np.float64).reshape(-1, 1)
    begin = np.linspace(flat.min(), flat.max(), 4).reshape(-1, 1)
    theirs = sklearn.KMeans(4, init=begin, n_init=1, tol=0.0, max_iter=500).fit(flat)
    np.testing.assert_allclose(cluster(weights, 4, False).codebook, np.sort(theirs.cluster_centers_.ravel()), rtol=1e-5)


def test_what_was_pruned_stays_zero() -> None:
    weights = np.random.default_rng(4).normal(size=(20, 30)).astype(np.float32)
    weights[np.abs(weights) < 0.7] = 0
    shared = cluster(weights, 16, keep_zeros=True)
    assert len(shared.codebook) == 16
    assert np.array_equal(shared.values.numpy() == 0, weights == 0)


@pytest.mark.parametrize("weights", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(4)])
@pytest.mark.parametrize("keep", [False, True])
def test_few_values_stay_themselves(weights: np.ndarray, keep: bool) -> None:
    assert np.array_equal(cluster(weights.astype(np.float32), 4, keep).values.numpy(), weights)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98, 0.9999, 1.0])
def test_matrices_come_back_from_their_files_form(share: float) -> None:
    """Few zeros, many, and so few others that distances of more than 256 are bridged."""
    generator = np.random.default_rng(5)
    weights = generator.normal(size=(200, 150)).astype(np.float32)
    weights[generator.random(weights.shape) < share] = 0
    shared = cluster(weights, 32, keep_zeros=share > 0)
    tensors, about = deep.written("a.weight", shared)
    assert ("gaps" in about["symbols"]) == (share >= 0.98)
    found = deep.read("a.weight", tensors, about)
    assert torch.equal(found.values, shared.values)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert nbytes < weights.nbytes / 5.5
    if share >= 0.98:  # a byte or so for each weight that is left, and what a form takes anyway
        assert nbytes < 3 * int((weights != 0).sum()) + 1200


def test_values_are_trained_by_the_sum_of_their_weights_gradients() -> None:
    model, batch = model_of("gpt").float(), batch_of()
    name = "blocks.1.mlp.up.weight"
    weight = dict(model.named_parameters())[name]
    shared = {name: cluster(weight.detach().numpy(), 4, False)}
    with torch.no_grad():
        weight.copy_(shared[name].values)
    loss = model.loss(batch)["lm"]
    (gradient,) = torch.autograd.grad(loss.sum / loss.count, [weight])
    sums = np.bincount(shared[name].codes.ravel(), gradient.double().numpy().ravel(), 4)
    found = finetune(model, shared, [batch], lr=0.5)[name]
    np.testing.assert_allclose(found.codebook, shared[name].codebook - 0.5 * sums, rtol=1e-5, atol=1e-7)
    assert isinstance(found, Shared) and np.array_equal(found.codes, shared[name].codes)
