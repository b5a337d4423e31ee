"""L1 and L2 penalties of the weights as a part of the objective, exact wherever the weights' shards are.

The objective is loss + l1 * sum of |w| + l2 / 2 * sum of w^2 over all elements of matrices: parameters of two dimensions
or more, embeddings included, and not biases and norms. Its gradient is that of the loss and l1 * sign(w) + l2 * w, with
sign(0) = 0, a subgradient. It needs no batch, so it is added once a step where the gradient of the loss is complete:
after sums over data ranks, codecs and tied copies, to each rank's own shard, and **before** norm and clipping. Then the
norm that is recorded and clipped is that of the objective, as in one process that adds the penalty to its loss; nothing
more is sent, and no codec sees it.

L2 here is coupled: with Adam the penalty's gradient is divided by the moments like all others. AdamW's decay is not
(Loshchilov and Hutter 2019, section 2), and stays `optim.weight_decay`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.parallel.collectives import reduce_over
from disttrain.parallel.groups import Group
from disttrain.parallel.sharding import LocalParameter


@dataclass(frozen=True)
class Penalties:
    """How much the weights cost."""

    l1: float = 0.0
    """Of the sum of absolute values."""
    l2: float = 0.0
    """Of half the sum of squares."""


@torch.no_grad()
def add_gradients(parameters: Iterable[LocalParameter], penalties: Penalties, scale: float = 1.0) -> None:
    """Add `scale` times the penalties' gradient to this rank's part of the gradient, in place.

    `scale` is the loss scale by which the gradients are still multiplied. A parameter that the loss does not reach has no
    gradient and stays as it is. Of a weight on two stages each copy gets the same, as it has the same gradient.
    """
    reached = [(p.master, gradient) for p in _matrices(parameters) if (gradient := p.gradient) is not None]
    if not reached:
        return
    weights, gradients = ([*tensors] for tensors in zip(*reached, strict=True))
    if penalties.l2:
        torch._foreach_add_(gradients, weights, alpha=scale * penalties.l2)
    if penalties.l1:
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=scale * penalties.l1)


@torch.no_grad()
def value(parameters: Iterable[LocalParameter], penalties: Penalties, world: Group, device: torch.device) -> Tensor:
    """l1 * sum of |w| + l2 / 2 * sum of w^2 over the whole model, float64 scalar, the same on every rank; all ranks call it.

    Each rank adds up its shards, divided by the number of ranks that hold a copy; what is on two stages counts once.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for p in _matrices(parameters):
        w = p.master.double()
        cost = penalties.l1 * w.abs().sum() + penalties.l2 / 2 * w.square().sum()
        total += cost.to(device) * p.share
    return reduce_over(world, total)


def _matrices(parameters: Iterable[LocalParameter]) -> list[LocalParameter]:
    return [p for p in parameters if len(p.shard.shape) >= 2]
