"""Losses that compare embeddings: InfoNCE, triplets, stochastic neighbours. Each a sum and a count.

Shapes: N examples, D features of an embedding. Inputs are widened to float32 (float64 stays) and products are formed in
that type, under autocast too: see `disttrain.models.losses` for what that means for half precision.

Where an example is compared with all others, the others are an argument of their own. A part of the batch against all
others gives its part of the sum; a part against itself alone would be another loss, with fewer negatives.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum
from disttrain.models.layers import LossSum
from disttrain.models.losses import widened

_STEPS = 100
"""Halvings of an interval: more than float64 has digits."""


def info_nce(
    queries: Tensor, keys: Tensor, temperature: float = 0.07, positives: Tensor | None = None,
    similarity: Literal["cosine", "dot"] = "cosine",
) -> LossSum:  # fmt: skip
    """InfoNCE: -log of exp(f(x, y) / t) over its sum for all keys (van den Oord et al. 2018, equation 4), nats.

    queries [N, D], keys [K, D]: the positive of query i is key positives[i] (int64 [N], -100 leaves the query out), i
    when not given; all other keys are its negatives, those of the same batch as a rule. f is the cosine, as of Chen et
    al. (2020), or the dot product. Raises ValueError for a temperature that is not positive, and for fewer keys than
    queries without `positives`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive")
    if positives is None:
        if len(keys) < len(queries):
            raise ValueError(f"{len(queries)} queries have {len(keys)} keys: say which key is the positive of which")
        positives = torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        x, y = widened(queries), widened(keys)
        if similarity == "cosine":
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        scores = x @ y.T / temperature
    return LossSum(cross_entropy_sum(scores, positives), (positives != IGNORED).sum())


def triplet(
    anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float = 1.0,
    distance: Literal["euclidean", "squared"] = "euclidean",
) -> LossSum:  # fmt: skip
    """[d(a, p) - d(a, n) + margin]_+ of three [N, D], summed; the count is N, triplets without a loss included.

    d is the Euclidean distance, as in torch.nn.TripletMarginLoss, or its square (Schroff et al. 2015, equation 3).
    """
    anchors, positives, negatives = widened(anchors), widened(positives), widened(negatives)
    near, far = ((anchors - other) for other in (positives, negatives))
    if distance == "squared":
        apart = near.square().sum(1) - far.square().sum(1)
    else:
        apart = torch.linalg.vector_norm(near, dim=1) - torch.linalg.vector_norm(far, dim=1)
    return LossSum((apart + margin).clamp(min=0).sum(), torch.tensor(len(anchors), device=anchors.device))


@torch.no_grad()
def neighbours(x: Tensor, perplexity: float) -> Tensor:
    """p_{j|i} of the neighbours j of each point i of x [N, D]: rows of [N, N] that sum to 1, with a diagonal of 0.

    p_{j|i} is a normal density around x_i, as wide as gives the row the entropy log(perplexity) (Hinton and Roweis 2002,
    section 2); widths are found by bisection. Raises ValueError for a perplexity outside 1 to N - 1, exclusive.
    """
    count = len(x)
    if not 1 < perplexity < count - 1:
        raise ValueError(f"perplexity={perplexity} is not between 1 and {count - 1}, the neighbours of {count} points")
    squares = _squared_distances(widened(x), widened(x)).fill_diagonal_(torch.inf)
    nearest = squares.min(1, keepdim=True).values
    squares = squares - nearest
    finite = squares.where(squares.isfinite(), 0)
    scale = (finite.sum(1) / (count - 1)).clamp(min=torch.finfo(squares.dtype).tiny)
    low, high = torch.full_like(scale, -30.0), torch.full_like(scale, 30.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        precision = (middle.exp() / scale)[:, None]
        weights = (-squares * precision).exp()
        total = weights.sum(1)
        entropy = total.log() + (weights * finite * precision).sum(1) / total
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (-squares * (((low + high) / 2).exp() / scale)[:, None]).softmax(1)


def joint_neighbours(conditional: Tensor) -> Tensor:
    """t-SNE's p_ij = (p_{j|i} + p_{i|j}) / 2N of [N, N]; they sum to 1 (van der Maaten and Hinton 2008, section 3.1)."""
    return (conditional + conditional.T) / (2 * len(conditional))


def sne(p: Tensor, y: Tensor, kernel: Literal["gaussian", "student"] = "gaussian", first: int = 0) -> LossSum:
    """Kullback-Leibler divergence sum of p_ij log(p_ij / q_ij), nats, of neighbours in an embedding y [N, D].

    gaussian (Hinton and Roweis 2002, equation 4): p holds conditional p_{j|i}, and q_{j|i} is exp(-d_ij^2) over its row.
    Divided by the count, N, it is the mean of the points' divergences, where the paper has their sum.
    student (t-SNE, van der Maaten and Hinton 2008, equations 4 and 5): p holds joint p_ij, and q_ij is 1 / (1 + d_ij^2)
    over all pairs. The sum is N times the divergence, so that divided by the count it is the paper's.

    p is [N, N], or its rows [n, N] from point `first` on: then sum and count are those points' parts, and y is still
    all N. p carries no gradient. The diagonal does not count. Memory: n N D numbers, and N N D for student.
    """
    count = len(y)
    if p.ndim != 2 or p.shape[1] != count or first + len(p) > count:
        raise ValueError(f"p {list(p.shape)} from point {first} on does not fit {count} points")
    p, y = widened(p.detach()), widened(y)
    rows = torch.arange(first, first + len(p), device=y.device)
    logits = _log_kernel(y[rows], y, kernel)
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, rows[:, None], True)
    if kernel == "gaussian":
        norm = logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    else:
        everyone = _log_kernel(y, y, kernel)
        pairs = ~torch.eye(count, dtype=torch.bool, device=y.device)
        norm = everyone[pairs].logsumexp(0)
    p = p.masked_fill(own, 0)
    divergence = torch.xlogy(p, p).sum() - (p * (logits - norm).masked_fill(own, 0)).sum()
    times = 1 if kernel == "gaussian" else count
    return LossSum(divergence * times, torch.tensor(len(p), device=y.device))


def _log_kernel(x: Tensor, y: Tensor, kernel: Literal["gaussian", "student"]) -> Tensor:
    squares = _squared_distances(x, y)
    return -squares if kernel == "gaussian" else -squares.log1p()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[n, D] and [N, D] -> [n, N], from differences: products would lose what close points differ by."""
    return (x[:, None] - y).square().sum(2)
