"""InfoNCE, triplets and stochastic neighbours against loops, hand-worked cases and torch."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.contrastive import info_nce, joint_neighbours, neighbours, sne, triplet

N, D = 9, 4


def points(seed: int, dtype: torch.dtype = torch.float64, count: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@functools.cache
def conditional() -> Tensor:
    """p_{j|i} of some points, numbers that bfloat16 has."""
    return neighbours(points(5), 3.0).bfloat16().float()


def test_info_nce_by_hand():
    """Query along the first axis, keys along both: cosines 1 and 0, temperature 1/2: log(1 + e^-2)."""
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    keys = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    assert info_nce(x, keys, 0.5).sum.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)
    dot = info_nce(x, keys, 0.5, torch.tensor([1]), similarity="dot")
    assert dot.sum.item() == pytest.approx(math.log1p(math.exp(12)), rel=1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_info_nce_written_out(similarity: Literal["cosine", "dot"]):
    queries, keys = points(0).detach(), points(1, count=12).detach()
    positives = torch.tensor([3, 0, -100, 11, 5, 5, 2, 1, 7])
    expected = 0.0
    for query, positive in zip(queries, positives.tolist(), strict=True):
        if positive >= 0:
            f = [float(F.cosine_similarity(query, key, 0) if similarity == "cosine" else query @ key) for key in keys]
            expected -= f[positive] / 0.3 - math.log(sum(math.exp(v / 0.3) for v in f))
    found = info_nce(queries, keys, 0.3, positives, similarity)
    assert found.sum.item() == pytest.approx(expected, rel=1e-10) and found.count == 8


def test_queries_may_be_split_against_all_keys():
    queries, keys = points(0), points(1)
    whole = info_nce(queries, keys)
    parts = [info_nce(queries[i : i + 4], keys, positives=torch.arange(i, min(i + 4, N))) for i in range(0, N, 4)]
    torch.testing.assert_close(torch.stack([part.sum for part in parts]).sum(), whole.sum, rtol=1e-12, atol=0)
    for leaf in (queries, keys):
        (expected,) = torch.autograd.grad(whole.sum, leaf, retain_graph=True)
        (found,) = torch.autograd.grad([part.sum for part in parts], leaf, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    alone = info_nce(queries[:4], keys[:4])
    assert alone.sum < parts[0].sum, "fewer negatives are another loss"


@pytest.mark.parametrize("distance", ["euclidean", "squared"])
def test_triplets(distance: Literal["euclidean", "squared"]):
    a, p, n = (points(seed).detach() for seed in range(3))
    found = triplet(a, p, n, 0.7, distance)
    if distance == "euclidean":
        expected = F.triplet_margin_loss(a, p, n, margin=0.7, eps=0, reduction="sum")
    else:
        expected = sum(
            max(0.0, float(((x - y) ** 2).sum() - ((x - z) ** 2).sum()) + 0.7) for x, y, z in zip(a, p, n, strict=True)
        )
    assert found.sum.item() == pytest.approx(float(expected), rel=1e-12) and found.count == N
    parts = [triplet(a[i : i + 4], p[i : i + 4], n[i : i + 4], 0.7, distance) for i in range(0, N, 4)]
    assert sum(float(part.sum) for part in parts) == pytest.approx(found.sum.item(), rel=1e-12)


def test_triplet_by_hand():
    """Distances 3 and 4 (a 3-4-5 triangle's legs): 3 - 4 + 2 = 1; squares: 9 - 16 + 2 < 0."""
    a, p, n = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert triplet(a, p, n, 2.0).sum == 1 and triplet(a, p, n, 2.0, "squared").sum == 0
    same = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(triplet(same, same.detach(), n, 5.0).sum, same)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("perplexity", [1.5, 3.0, 7.0])
def test_neighbours_have_the_perplexity(perplexity: float):
    p = neighbours(points(3), perplexity)
    torch.testing.assert_close(p.sum(1), torch.ones(N, dtype=torch.float64), rtol=1e-12, atol=0)
    assert p.diagonal().count_nonzero() == 0 and not p.requires_grad
    entropy = -torch.xlogy(p, p).sum(1)
    torch.testing.assert_close(entropy.exp(), torch.full((N,), perplexity, dtype=torch.float64), rtol=1e-9, atol=0)
    scaled = neighbours(1000 * points(3), perplexity)
    torch.testing.assert_close(scaled, p, rtol=1e-8, atol=1e-10)
    joint = joint_neighbours(p)
    assert joint.sum().item() == pytest.approx(1) and torch.equal(joint, joint.T)


def test_neighbours_follow_a_normal_density():
    """log p_{j|i} is linear in the squared distance: three points on a line at 0, 1, 2, from the first."""
    p = neighbours(torch.tensor([[0.0], [1.0], [2.0], [4.0]], dtype=torch.float64), 2.0)[0]
    slopes = (p[1:].log()[1:] - p[1:].log()[:-1]) / torch.tensor([3.0, 12.0], dtype=torch.float64)
    assert slopes[0] < 0 and slopes[0].item() == pytest.approx(slopes[1].item(), rel=1e-9)


def written_out(p: Tensor, y: Tensor, kernel: str) -> float:
    weigh: Callable[[float], float] = (lambda s: math.exp(-s)) if kernel == "gaussian" else (lambda s: 1 / (1 + s))
    q = [[0.0 if i == j else weigh(float(((a - b) ** 2).sum())) for j, b in enumerate(y)] for i, a in enumerate(y)]
    total = sum(map(sum, q))
    divergence = 0.0
    for i, row in enumerate(q):
        norm = sum(row) if kernel == "gaussian" else total
        for j, weight in enumerate(row):
            if i != j and p[i, j] > 0:
                divergence += float(p[i, j]) * math.log(float(p[i, j]) / (weight / norm))
    return divergence


@pytest.mark.parametrize("kernel", ["gaussian", "student"])
def test_divergence(kernel: Literal["gaussian", "student"]):
    """The paper's sum, its parts by rows, its gradient, and 0 where the embedding has the same neighbours."""
    y = points(4)
    p = neighbours(points(3), 3.0)
    p = p if kernel == "gaussian" else joint_neighbours(p)
    whole = sne(p, y, kernel)
    times = 1 if kernel == "gaussian" else N
    assert whole.sum.item() == pytest.approx(times * written_out(p, y.detach(), kernel), rel=1e-10)
    assert whole.count == N and whole.sum > 0
    parts = [sne(p[i : i + 4], y, kernel, i) for i in range(0, N, 4)]
    torch.testing.assert_close(torch.stack([part.sum for part in parts]).sum(), whole.sum, rtol=1e-11, atol=0)
    (expected,) = torch.autograd.grad(whole.sum, y)
    (found,) = torch.autograd.grad([part.sum for part in parts], y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: sne(p, x, kernel).sum, (y,))


def test_the_same_neighbours_do_not_diverge():
    """q of the embedding itself, given as p."""
    y = points(4).detach()
    squares = torch.cdist(y, y).square()
    q = (-squares).fill_diagonal_(-torch.inf).softmax(1)
    assert sne(q, y).sum.item() == pytest.approx(0, abs=1e-12)
    student = (1 / (1 + squares)).fill_diagonal_(0)
    assert sne(student / student.sum(), y, "student").sum.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, z: info_nce(x, y),
        lambda x, y, z: info_nce(x, y, similarity="dot"),
        triplet,
        lambda x, y, z: triplet(x, y, z, distance="squared"),
        lambda x, y, z: sne(conditional(), x),
        lambda x, y, z: sne(joint_neighbours(conditional()), x, "student"),
    ],
)
def test_gradients_and_half_precision(loss: Callable):
    x, y, z = points(0), points(1).detach(), points(2).detach()
    assert torch.autograd.gradcheck(lambda a: loss(a, y, z).sum, (x,))
    half = [v.detach().bfloat16() for v in (x, y, z)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*half).sum
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(*(v.double() for v in half)).sum.item(), rel=2e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: info_nce(x, x, 0.0),
        lambda x: info_nce(x, x[:3]),
        lambda x: neighbours(x, 1.0),
        lambda x: neighbours(x, N - 1.0),
        lambda x: sne(torch.ones(4, N), x, first=6),
        lambda x: sne(torch.ones(N, 4), x),
    ],
)
def test_refusals(call: Callable):
    with pytest.raises(ValueError):
        call(points(0))
