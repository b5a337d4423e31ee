"""Element-wise magnitude pruning of a trained model (Han et al. 2015): the smallest weights become zero.

The matrices keep their shapes: what is saved shows where zeros are coded (`disttrain.model_compression.deep`), and
pruning.method=keep lets the others train on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from disttrain.sparsity import prunable


def prune(weights: Mapping[str, Tensor], share: float, each: bool, embeddings: bool) -> dict[str, Tensor]:
    """Copies of all weights, of which this share of the prunable elements is zero, or this share of `each` matrix.

    The number of zeros is rounded to the nearest; elements as large as the last one become zero with it.
    """
    found = {name: value.clone() for name, value in weights.items()}
    pruned = {name: value for name, value in found.items() if prunable(name, value.shape, embeddings)}
    groups = [[value] for value in pruned.values()] if each else [list(pruned.values())]
    for group in groups:
        magnitudes = torch.cat([value.abs().flatten() for value in group])
        count = round(share * magnitudes.numel())
        if count:
            bound = magnitudes.kthvalue(count).values
            for value in group:
                value.masked_fill_(value.abs() <= bound, 0)
    return found


def zeros(weights: Mapping[str, Tensor]) -> float:
    """Share of the elements of all matrices that are zero."""
    matrices = [value for value in weights.values() if value.ndim > 1]
    return float(sum(int((m == 0).sum()) for m in matrices)) / max(1, sum(m.numel() for m in matrices))
