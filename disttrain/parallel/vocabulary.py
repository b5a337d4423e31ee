"""Cross-entropy and argmax over a vocabulary whose logits lie on several ranks; logits themselves never travel.

Shapes: N tokens with a target, V vocabulary, Vr this rank's part of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from disttrain.models.cross_entropy import IGNORED, row_chunks
from disttrain.parallel.conjugate import own_range, start_gather
from disttrain.parallel.groups import Group


class ShardedVocabulary:
    """The twin of `WholeVocabulary` for logits [.., Vr] of `own_range(vocab_size, group)`, which may be uneven or empty.

    Every rank must hold the same rows, and gets the same results, bit for bit.
    """

    def __init__(self, group: Group, vocab_size: int):
        self.group, self.size = group, vocab_size
        self.part = own_range(vocab_size, group)

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Summed cross-entropy in nats of logits [N, Vr] against int64 targets [N] of the whole vocabulary.

        Dtypes, ignored targets and smoothing as in `models.cross_entropy.cross_entropy_sum`, smoothing over all V
        entries. One all-gather of two numbers a row: log-sum-exp and the expected logit of each part (Shoeybi et al.
        2019, section 3, fuse the same way, with three reductions). The gradient needs no communication.
        """
        return _ShardedCrossEntropySum.apply(logits, targets, label_smoothing, self)  # pyright: ignore

    @torch.no_grad()
    def argmax(self, logits: Tensor) -> Tensor:
        """The likeliest entry of each row of the whole vocabulary, the first of equals: [.., Vr] -> int64 [..]."""
        best = torch.empty(2, *logits.shape[:-1], dtype=torch.float64, device=logits.device)
        if self.part:
            values, indices = logits.max(-1)
            best[0], best[1] = values, indices + self.part.start
        else:
            best[0], best[1] = -torch.inf, self.size
        values, indices = self.gather(best).unbind(1)
        return indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0).long()

    def gather(self, rows: Tensor) -> Tensor:
        """[..] of every rank -> [ranks, ..]."""
        return rows[None] if self.group.size == 1 else start_gather(rows[None], 0, self.group)()


class _ShardedCrossEntropySum(torch.autograd.Function):
    """`models.cross_entropy._CrossEntropySum` on a part of the columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float, of: ShardedVocabulary) -> Tensor:
        """Returns the sum over the rows whose target counts, a scalar."""
        counts = targets != IGNORED
        targets = targets - of.part.start
        here = counts & (targets >= 0) & (targets < len(of.part))
        targets = targets.where(here, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ours = logits.new_empty(2, len(logits), dtype=dtype)
        log_sum, expected = ours[0].fill_(-torch.inf), ours[1].zero_()
        if of.part:
            at_target = logits.gather(1, targets[:, None]).squeeze(1).to(dtype)
            expected.copy_(at_target.mul_(1 - label_smoothing).where(here, 0.0))
            for rows in row_chunks(logits):
                wide = logits[rows].to(dtype)
                torch.logsumexp(wide, 1, out=log_sum[rows])
                if label_smoothing:
                    expected[rows] += label_smoothing / of.size * wide.sum(1)
        log_sums, expecteds = of.gather(ours).unbind(1)
        log_sum = log_sums.logsumexp(0)
        ctx.save_for_backward(logits, targets, counts, here, log_sum)
        ctx.label_smoothing, ctx.size = label_smoothing, of.size
        return (log_sum - expecteds.sum(0)).where(counts, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """d loss / d logit = softmax(logits) - the target distribution, 0 for ignored rows."""
        logits, targets, counts, here, log_sum = ctx.saved_tensors
        smoothing = ctx.label_smoothing
        scale = grad * counts
        grads = torch.empty_like(logits)
        if not logits.shape[1]:
            return grads, None, None, None
        at_target = (smoothing - 1) * here.to(log_sum.dtype)
        for rows in row_chunks(logits):
            wide = torch.sub(logits[rows], log_sum[rows, None]).exp_()
            if smoothing:
                wide -= smoothing / ctx.size
            wide.scatter_add_(1, targets[rows, None], at_target[rows, None])
            torch.mul(wide, scale[rows, None], out=wide)
            grads[rows] = wide
        return grads, None, None, None
