"""Losses of classification and regression, each a sum and a count that are divided once a step.

Shapes: N examples, C classes, M unit regions. `logits` are [N, C], for a softmax, or [N], the logit of class 1 of two,
for a sigmoid. `targets` are int64 [N]; -100 is ignored: it adds nothing to sum, count or gradient.

What comes in is widened to float32 (float64 stays) before anything is computed, under autocast too. So the loss of
bfloat16 or float16 logits is that of the rounded numbers within float32's accuracy, a relative 1e-5, and only the
gradient is rounded to their type.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum
from disttrain.models.layers import LossSum


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> LossSum:
    """-log p of the target, nats; for [N, C] smoothed as in `cross_entropy_sum` (Szegedy et al. 2016, section 7).

    Raises ValueError for smoothing of [N] logits.
    """
    if logits.ndim == 2:
        return LossSum(cross_entropy_sum(logits, targets, label_smoothing), (targets != IGNORED).sum())
    if label_smoothing:
        raise ValueError("label smoothing is for logits [N, C]: give two columns for two classes")
    return _summed(-log_odds(logits, targets).right, targets)


class LogOdds(NamedTuple):
    """How likely the targets are, and everything else; both exact where they are next to 0."""

    right: Tensor
    """log p, [N]; of class 0 where the target is ignored."""
    wrong: Tensor
    """log (1 - p), [N]."""


def log_odds(logits: Tensor, targets: Tensor) -> LogOdds:
    """Logarithms of the target's probability and of the others' together.

    1 - p is the sum of the other classes, not a difference, so that neither it nor a power of it loses its digits or its
    gradient where p is almost 1. Raises ValueError for logits that are neither [N] nor [N, C] with C of at least 2.
    """
    targets, x = targets.where(targets != IGNORED, 0), widened(logits)
    if x.ndim == 1:
        signed = torch.where(targets == 1, x, -x)
        return LogOdds(F.logsigmoid(signed), F.logsigmoid(-signed))
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"logits have the shape {list(x.shape)}; they are [N], or [N, C] of two classes or more")
    column = targets[:, None]
    everything = x.logsumexp(1)
    others = x.scatter(1, column, -torch.inf).logsumexp(1)
    return LogOdds(x.gather(1, column).squeeze(1) - everything, others - everything)


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: Sequence[float] | None = None) -> LossSum:
    """Focal loss -alpha (1 - p)^gamma log p of the target (Lin et al. 2017, equation 5), summed; the count is of targets.

    The paper divides by the number of objects, a choice of its task. `alpha` is a factor of each class: the paper's
    alpha = 0.25 of class 1 is (0.75, 0.25). gamma = 0 without alpha is cross-entropy. Raises ValueError for a negative
    gamma or an alpha of another length.
    """
    if gamma < 0:
        raise ValueError(f"gamma={gamma} is negative")
    odds = log_odds(logits, targets)
    losses = -odds.right if gamma == 0 else -(gamma * odds.wrong).exp() * odds.right
    if alpha is not None:
        classes = 2 if logits.ndim == 1 else logits.shape[1]
        if len(alpha) != classes:
            raise ValueError(f"alpha has {len(alpha)} factors for {classes} classes")
        losses = losses * losses.new_tensor(alpha)[targets.where(targets != IGNORED, 0)]
    return _summed(losses, targets)


def ghm_counts(logits: Tensor, targets: Tensor, regions: int = 10) -> Tensor:
    """How many examples have g = |p - p*| = 1 - p in each of M regions of [0, 1] of equal width, int64 [M].

    The last region takes g = 1 as well. No gradient. Counts of parts of a batch add up to those of the batch.
    """
    with torch.no_grad():
        g = log_odds(logits, targets).wrong.exp()
        region = (g * regions).long().clamp(max=regions - 1)
        return torch.zeros(regions, dtype=torch.int64, device=g.device).scatter_add_(
            0, region, (targets != IGNORED).long()
        )


def ghm_density(counts: Tensor, before: Tensor | None, momentum: float = 0.0,
                reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
    """Examples in each region, averaged over the steps: S = momentum S + (1 - momentum) R (Li et al. 2019, equation 9).

    `counts` int64 [M] are R of this step's examples, or of those of this rank: `reduce` gives their sum over the ranks
    that hold other examples. `before` is what this function gave a step ago, float64 [M]; the first S is R, where the
    authors' code starts from 0 and so makes the first losses too large. The result is all there is to keep from step to
    step and to save in a checkpoint. Raises ValueError for a momentum outside 0 to below 1.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} is outside 0 to below 1")
    now = (counts if reduce is None else reduce(counts)).double()
    return now if before is None else before * momentum + now * (1 - momentum)


def ghm(logits: Tensor, targets: Tensor, density: Tensor) -> LossSum:
    """GHM-C: cross-entropy divided by the gradient density (Li et al. 2019, equations 4 to 8), summed.

    An example weighs beta = N / GD(g), with the density GD(g) = S_j / width of its region j. `density` [M] holds the S
    of `ghm_density`, and N is their sum: the step's number of examples, or its moving average as they are. A region
    where no example has been seen counts as one with a single example. No gradient goes through the weights.

    The loss of an example depends on the whole batch, through the density. Take the counts of a whole step, summed over
    micro-batches and ranks, before the first loss; then any split of the batch gives the same sum. A density of each
    rank's own examples, or each micro-batch's, is another loss. The paper's g is of a sigmoid; for a softmax it is here
    1 - p of the target, the derivative by the target's logit.
    """
    odds = log_odds(logits, targets)
    with torch.no_grad():
        regions = len(density)
        region = (odds.wrong.exp() * regions).long().clamp(max=regions - 1)
        seen = torch.where(density > 0, density, 1.0)
        weights = (density.sum() / (seen * regions)).to(odds.right.dtype)[region]
    return _summed(-weights * odds.right, targets)


def squared_error(predictions: Tensor, targets: Tensor, counted: Tensor | None = None) -> LossSum:
    """Summed (prediction - target)^2 of two tensors of one shape, and their number of elements.

    `counted`, bool of that shape, says which elements count. Raises ValueError for two shapes, which would broadcast.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {list(predictions.shape)} and targets {list(targets.shape)} differ in shape")
    squares = (widened(predictions) - widened(targets)).square()
    if counted is None:
        return LossSum(squares.sum(), torch.tensor(squares.numel(), device=squares.device))
    return LossSum(squares.where(counted, 0).sum(), counted.sum())


def _summed(losses: Tensor, targets: Tensor) -> LossSum:
    counts = targets != IGNORED
    return LossSum(losses.where(counts, 0).sum(), counts.sum())
