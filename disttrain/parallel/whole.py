"""Numbers of whole parameters where ranks hold parts of them: what layer-wise optimizers need."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from disttrain.optim import Across
from disttrain.parallel.collectives import all_gather_flat, all_gathered
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.sharding import LocalParameter, Shard


def across_parts(parameters: Sequence[LocalParameter], groups: Groups, data: Group, device: torch.device) -> Across:
    """Puts the numbers of a stage's parts together: one message along each axis that cuts a parameter. `data`: the
    data ranks with the same weights.

    Every rank gets those of all and adds them in the same order, so that the copies of a tied weight, whose numbers lie in
    other places of the message, do not drift apart.
    """
    shards = {p.master: p.shard for p in parameters}
    axes: list[tuple[Group, Callable[[Shard], int]]] = []
    if any(shard.data_cut for shard in shards.values()):
        replicas = data.size // (groups.mesh.shard * groups.mesh.context)
        axes.append((data, lambda shard: replicas if shard.data_cut else data.size))
    if any(shard.tensor_cut for shard in shards.values()):
        axes.append((groups.tensor, lambda shard: 1 if shard.tensor_cut else groups.tensor.size))

    def across(of: Sequence[Tensor], values: Tensor, how: Literal["sum", "max"]) -> Tensor:
        whole = values.to(device)
        for group, copies in axes:
            if how == "sum":
                whole = whole / whole.new_tensor([copies(shards[p]) for p in of])  # pyright: ignore  masters are parameters
            whole = reduce(torch.add if how == "sum" else torch.maximum, gathered(group, whole))
        return whole.to(values.device)

    return across


def gathered(group: Group, values: Tensor) -> list[Tensor]:
    """The values of every rank of a group, in their order."""
    if group.size == 1:
        return [values]
    rows = values.new_empty(group.size, values.numel())
    with group.sending("all_gather", values, all_gathered(group.size)):
        all_gather_flat(rows.view(-1), values.reshape(-1), group.process_group)
    return [row.view_as(values) for row in rows]
