"""Adasum (Maleki et al. 2021): vectors of several ranks combined so that what they agree on counts once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from disttrain.grad_compression.carriage import joined
from disttrain.grad_compression.link import Link


def adasum(vectors: Sequence[Tensor], link: Link, total: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Flat vectors combined with those of the other ranks, each by itself (ibid., section 3.2), the same bits on all.

    Of two, (1 - a.b / 2 a.a) a + (1 - a.b / 2 b.b) b: the sum of orthogonal ones, the mean of equal ones; of more, pairs of
    neighbours, then pairs of these; one without a neighbour waits. An all-to-all gives each rank all versions of one chunk;
    `total` sums the products of chunks, in float64, over all ranks that hold parts of the vectors.
    """
    rows = joined(vectors, link.size).view(link.size, -1)
    n, start = rows.shape[1], link.rank * rows.shape[1]
    sizes = [x.numel() for x in vectors]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    pieces = [(max(end - size - start, 0), min(max(end - start, 0), n)) for end, size in zip(ends, sizes, strict=True)]
    versions = list(link.exchange(rows)())
    while len(versions) > 1:
        pairs = list(zip(versions[::2], versions[1::2], strict=False))
        products = total(torch.stack([_products(a, b, pieces) for a, b in pairs]))
        combined = [_combined(a, b, pieces, each) for (a, b), each in zip(pairs, products, strict=True)]
        versions = combined + versions[2 * len(pairs) :]
    whole = link.gather(versions[0])().reshape(-1)
    return list(whole.split([*sizes, rows.numel() - sum(sizes)])[:-1])


def _products(a: Tensor, b: Tensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
    """a.b, a.a and b.b of every vector's piece: [vectors, 3]."""
    parts = [(a[i:j].double(), b[i:j].double()) for i, j in pieces]
    return torch.stack([torch.stack([x @ y, x @ x, y @ y]) for x, y in parts])


def _combined(a: Tensor, b: Tensor, pieces: Sequence[tuple[int, int]], products: Tensor) -> Tensor:
    both = products[:, :1]
    alone = products[:, 1:]
    factors = 1 - torch.where(alone > 0, both / (2 * alone), torch.zeros_like(alone))  # [vectors, 2]
    result = torch.zeros_like(a)
    for (i, j), factor in zip(pieces, factors.to(a.dtype), strict=True):
        torch.add(a[i:j] * factor[0], b[i:j] * factor[1], out=result[i:j])
    return result
