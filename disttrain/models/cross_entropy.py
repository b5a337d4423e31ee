"""Cross-entropy without a float32 copy of all logits.

Shapes: N tokens with a target, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from disttrain.costs import CHUNK_ELEMENTS

IGNORED = -100
"""Target of a position that is not predicted."""


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy in nats of logits [N, V] against int64 targets [N]; ignored targets add nothing.

    Computed in float32 (float64 for float64 logits) whatever the logits' dtype, under autocast too. Smoothing e means,
    as in torch.nn.functional.cross_entropy, the target distribution (1 - e) * one_hot + e / V. Not twice
    differentiable.
    """
    return _CrossEntropySum.apply(logits, targets, label_smoothing)  # pyright: ignore[reportReturnType]


class Vocabulary(Protocol):
    """What a model asks of its logits [N, V], wherever they are."""

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Summed cross-entropy, nats, as `cross_entropy_sum`."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """The likeliest entry of each row: [..., V] -> int64 [...]."""
        ...


class WholeVocabulary:
    """All logits are here; tensor parallelism gives a model a sharded twin of this."""

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """See `cross_entropy_sum`."""
        return cross_entropy_sum(logits, targets, label_smoothing)

    def argmax(self, logits: Tensor) -> Tensor:
        """The likeliest entry of each row: [..., V] -> int64 [...]."""
        return logits.argmax(-1)


class _CrossEntropySum(torch.autograd.Function):
    """Saves the logits and one log-sum-exp a row, and widens a few rows at a time in both directions.

    torch's own cross-entropy holds log-probabilities and their gradient in float32 for all rows, next to the logits
    and their gradient: 12 bytes more for each bfloat16 logit.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Returns the sum over the rows whose target counts, a scalar."""
        counts = targets != IGNORED
        targets = targets.where(counts, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_sum = logits.new_empty(len(logits), dtype=dtype)
        expected = logits.gather(1, targets[:, None]).squeeze(1).to(dtype).mul_(1 - label_smoothing)
        for rows in row_chunks(logits):
            wide = logits[rows].to(dtype)
            torch.logsumexp(wide, 1, out=log_sum[rows])
            if label_smoothing:
                expected[rows] += label_smoothing * wide.mean(1)
        ctx.save_for_backward(logits, targets, counts, log_sum)
        ctx.label_smoothing = label_smoothing
        return (log_sum - expected).where(counts, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """d loss / d logit = softmax(logits) - the target distribution, 0 for ignored rows."""
        logits, targets, counts, log_sum = ctx.saved_tensors
        smoothing = ctx.label_smoothing
        scale = grads[0] * counts
        grad = torch.empty_like(logits)
        for rows in row_chunks(logits):
            wide = torch.sub(logits[rows], log_sum[rows, None]).exp_()
            if smoothing:
                wide -= smoothing / logits.shape[1]
            wide.scatter_add_(1, targets[rows, None], wide.new_full((len(wide), 1), smoothing - 1))
            torch.mul(wide, scale[rows, None], out=wide)
            grad[rows] = wide
        return grad, None, None


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Runs of rows small enough to be widened to float32 at once."""
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"])
    step = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))
