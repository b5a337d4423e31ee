"""Numbers of whole parameters, and whole ones, where ranks hold parts: what optimizers need that go by matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from disttrain.optim import Parts
from disttrain.parallel.collectives import all_gather_flat, all_gathered
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.sharding import Cut, LocalParameter, Shard


@dataclass(frozen=True)
class _Axis:
    """Ranks between which some parameters are cut."""

    group: Group
    copies: Callable[[Shard], int]
    """How many of them hold the same part of a parameter."""


def parts_of(parameters: Sequence[LocalParameter], groups: Groups, data: Group, device: torch.device) -> Parts:
    """Puts the parts of a stage's parameters together. `data`: the data ranks with the same weights.

    Numbers travel in one message along each axis that cuts a parameter. Every rank gets those of all and adds them in the
    same order, so that the copies of a tied weight, whose numbers lie in other places of the message, do not drift apart.
    """
    shards: dict[Tensor, Shard] = {p.master: p.shard for p in parameters}
    axes: list[_Axis] = []
    if any(shard.data_cut for shard in shards.values()):
        replicas = data.size // (groups.mesh.shard * groups.mesh.context)
        axes.append(_Axis(data, lambda shard: replicas if shard.data_cut else data.size))
    if any(shard.tensor_cut for shard in shards.values()):
        axes.append(_Axis(groups.tensor, lambda shard: 1 if shard.tensor_cut else groups.tensor.size))

    def across(of: Sequence[Tensor], values: Tensor, how: Literal["sum", "max"]) -> Tensor:
        whole = values.to(device)
        for axis in axes:
            if how == "sum":
                whole = whole / whole.new_tensor([axis.copies(shards[p]) for p in of])
            whole = reduce(torch.add if how == "sum" else torch.maximum, gathered(axis.group, whole))
        return whole.to(values.device)

    def summed(of: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        whole, sizes = torch.cat(list(vectors)).to(device), [vector.numel() for vector in vectors]
        for axis in axes:
            copies = whole.new_tensor([axis.copies(shards[p]) for p in of])
            whole = whole / copies.repeat_interleave(torch.tensor(sizes, device=device))
            whole = reduce(torch.add, gathered(axis.group, whole))
        return list(whole.to(vectors[0].device).split(sizes))

    def whole(parameter: Tensor, part: Tensor) -> Tensor:
        between = groups.inner(1) if groups.mesh.replicate > 1 and shards[parameter].data_cut else data
        return _joined(shards[parameter], part.to(device), between, groups.tensor)

    return Parts(across, lambda p: shards[p].shape, lambda p: shards[p].slices, summed, whole)


def _joined(shard: Shard, part: Tensor, data: Group, tensor: Group) -> Tensor:
    """The whole tensor of all parts: those of ZeRO first, which cuts what the tensor axis has left."""
    outer = shard.shape if shard.tensor_cut is None else _sizes(shard.shape, shard.tensor_cut, shard.tensor_cut.index)
    whole = part if shard.data_cut is None else _along(part, outer, shard.data_cut, data)
    return whole if shard.tensor_cut is None else _along(whole, shard.shape, shard.tensor_cut, tensor)


def _along(part: Tensor, shape: Sequence[int], cut: Cut, group: Group) -> Tensor:
    """What a cut has parted, of this shape. Chunks travel in the size of the largest; the last may be shorter or empty."""
    largest = _sizes(shape, cut, 0)
    padded = part.new_zeros(largest)
    padded[tuple(slice(size) for size in part.shape)] = part
    rows = gathered(group, padded)
    sizes = [_sizes(shape, cut, index)[cut.dim] for index in range(cut.chunks)]
    return torch.cat([row.narrow(cut.dim, 0, size) for row, size in zip(rows, sizes, strict=True)], cut.dim)


def _sizes(shape: Sequence[int], cut: Cut, index: int) -> list[int]:
    """Of a chunk: torch.chunk's."""
    each = -(-shape[cut.dim] // cut.chunks)
    sizes = list(shape)
    sizes[cut.dim] = max(0, min(each, shape[cut.dim] - index * each))
    return sizes


def gathered(group: Group, values: Tensor) -> list[Tensor]:
    """The values of every rank of a group, in their order."""
    if group.size == 1:
        return [values]
    rows = values.new_empty(group.size, values.numel())
    with group.sending("all_gather", values, all_gathered(group.size)):
        all_gather_flat(rows.view(-1), values.reshape(-1), group.process_group)
    return [row.view_as(values) for row in rows]
