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

import torch
from torch import Tensor

from disttrain.parallel.sharding import LocalParameter


@torch.no_grad()
def add_gradients(parameters: Iterable[LocalParameter], l1: float, l2: float, scale: float = 1.0) -> None:
    """Add `scale` times the penalties' gradient to this rank's part of the gradient, in place.

    `scale` is the loss scale by which the gradients are still multiplied. A parameter that the loss does not reach has no
    gradient and stays as it is. Of a weight on two stages each copy gets the same, as it has the same gradient.
    """
    if not (l1 or l2):
        return
    matrices = [p for p in parameters if len(p.shard.shape) >= 2]
    reached = [(p.master, gradient) for p in matrices if (gradient := p.gradient) is not None]
    for device in {gradient.device for _, gradient in reached}:
        weights: list[Tensor] = [w for w, gradient in reached if gradient.device == device]
        gradients = [gradient for _, gradient in reached if gradient.device == device]
        if l2:
            torch._foreach_add_(gradients, weights, alpha=scale * l2)
        if l1:
            torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=scale * l1)
