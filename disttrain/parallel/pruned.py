"""Weights that are zero stay zero, and more become zero by a schedule: on local shards, equal to one process.

A mask needs no state of its own: what is exactly zero is masked. So a checkpoint holds it, under any layout, and a run
that begins with pruned weights has it too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from disttrain import sparsity
from disttrain.config.smaller import PruningConfig
from disttrain.parallel.collectives import gather_objects, reduce_over
from disttrain.parallel.groups import Groups
from disttrain.parallel.sharding import LocalParameter

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The whole numbers in whose order magnitudes are."""
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
"""Infinity as such a number."""


@contextmanager
def pruned(pruning: PruningConfig, parameters: Sequence[LocalParameter], groups: Groups, step: int) -> Iterator[None]:
    """Update the weights inside: those that were zero are zero again, then as many as this step asks for.

    All ranks call it together. Nothing is done where pruning.method=none.
    """
    if pruning.method == "none":
        yield
        return
    held = [p for p in parameters if sparsity.prunable(p.shard.name, p.shard.shape, pruning.embeddings)]
    with torch.no_grad():
        zeros = [p.master == 0 for p in held]
        yield
        for p, zero in zip(held, zeros, strict=True):
            p.master.masked_fill_(zero, 0)
        share = sparsity.due(pruning, step)
        if share is not None:
            prune(held, groups, share, pruning.scope == "matrix", parameters[0])


@torch.no_grad()
def prune(held: Sequence[LocalParameter], groups: Groups, share: float, each: bool, like: LocalParameter) -> None:
    """Set the smallest magnitudes to zero, in place, so that this share of all elements is zero, or of `each` parameter.

    The number of zeros is rounded to the nearest; elements as large as the last one become zero with it. The bound is
    found by bisection over the bits of a number, which are in the order of magnitudes: one sum over the world for each
    bit, 31 or 63, so that no rank needs another's weights and the bound is exact. `like` is any parameter of
    this rank, which may hold no matrix. All ranks call it together.
    """
    places = _places(held, each)
    kind, device = like.master.dtype, like.share.device
    bits = [p.master.abs().view(BITS[kind]) for p in held]
    whole = _sum(held, [torch.tensor(float(b.numel())) for b in bits], places, groups, device)
    wanted = (whole * share).round()
    low = torch.full_like(wanted, -1, dtype=torch.int64)
    high = torch.full_like(low, INFINITY[kind])
    for _ in range(8 * kind.itemsize - 1):
        middle = low + (high - low) // 2
        counts = [(b <= middle[places[_name(p)]].to(b.device)).sum() for p, b in zip(held, bits, strict=True)]
        reached = _sum(held, counts, places, groups, device) >= wanted - 0.5
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    for p, b in zip(held, bits, strict=True):
        p.master.masked_fill_(b <= high[places[_name(p)]].to(b.device), 0)


def _name(p: LocalParameter) -> str:
    """A copy on another stage is pruned as what it copies."""
    return p.shard.tied_to or p.shard.name


def _places(held: Sequence[LocalParameter], each: bool) -> dict[str, int]:
    """Which of the sums a parameter belongs to: its own, or the only one."""
    own = [_name(p) for p in held]
    names = sorted({name for names in gather_objects(own) for name in names}) if each else own
    return {name: number if each else 0 for number, name in enumerate(names)}


def _sum(
    held: Sequence[LocalParameter],
    counts: Sequence[Tensor],
    places: dict[str, int],
    groups: Groups,
    device: torch.device,
) -> Tensor:
    """float64 [places]: counts of all ranks, each element of the whole parameters once."""
    total = torch.zeros(max(places.values(), default=0) + 1, dtype=torch.float64, device=device)
    for p, count in zip(held, counts, strict=True):
        total[places[_name(p)]] += count.to(device) * p.share
    return reduce_over(groups.world, total)
