"""Conjugate collectives: what crosses ranks on the way forward, and its transpose on the way back.

Megatron-LM's operator g (Shoeybi et al. 2019, section 3) and what sequence parallelism needs where blocks begin and end
(Korthikanti et al. 2022, section 4.2.2); f and its twin are fused with the products in `disttrain.parallel.tensor`, from
the started collectives below. All are the identity on a group of one, hand over contiguous tensors, count them on the
group's traffic, and leave what they are given unchanged. Chunks along a dim are equal: ValueError where the size does
not divide it. Nothing waits for the device. `torch.compile` breaks its graph around each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from disttrain.parallel.collectives import (
    all_gather_flat,
    all_gathered,
    all_reduced,
    exchanged,
    reduce_scatter_flat,
    reduce_scattered,
)
from disttrain.parallel.groups import Group

Pending = Callable[[], Tensor]
"""Waits for a collective that was started, on the device's stream where there is one, and gives its result."""


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x; its gradient goes to each unchanged (Megatron's g)."""
    return x if group.size == 1 else _apply(_ReduceFrom, x, group)


def gather_from(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' chunks joined along dim, for what every rank then does alike; each takes its chunk of the gradient."""
    return x if group.size == 1 else _apply(_GatherFrom, x, dim, group)


def split_to(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's chunk of an x that is the same on every rank; the gradients are joined."""
    return x if group.size == 1 else _apply(_SplitTo, x, dim, group)


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    """Chunk i of x along split_dim goes to rank i; what comes is joined along concat_dim, in order of rank."""
    return x if group.size == 1 else _apply(_AllToAll, x, split_dim, concat_dim, group)


def own_range(size: int, group: Group) -> range:
    """Which of `size` rows this rank holds when they are cut as by torch.chunk: the last ranks may have fewer, or none."""
    chunk = -(-size // group.size)
    return range(min(group.rank * chunk, size), min((group.rank + 1) * chunk, size))


def start_all_reduce(x: Tensor, group: Group) -> Pending:
    """Start summing over the group, in place where x is contiguous."""
    x = x.contiguous()
    with group.sending("all_reduce", x, all_reduced(group.size)) as until:
        work = until(dist.all_reduce(x, group=group.process_group, async_op=True))
    return _after(work, lambda: x)


def start_gather(x: Tensor, dim: int, group: Group) -> Pending:
    """Start joining the ranks' equal chunks along dim."""
    x = x.contiguous()
    gathered = x.new_empty(group.size, *x.shape)
    with group.sending("all_gather", x, all_gathered(group.size)) as until:
        work = until(all_gather_flat(gathered, x[None], group.process_group, async_op=True))
    return _after(work, lambda: _join(gathered, dim))


def start_reduce_scatter(x: Tensor, dim: int, group: Group) -> Pending:
    """Start summing over the group; each rank gets its chunk along dim."""
    chunks = _cut(x, dim, group.size)
    summed = chunks.new_empty(chunks.shape[1:])
    with group.sending("reduce_scatter", chunks, reduce_scattered(group.size, x.device)) as until:
        work = until(reduce_scatter_flat(summed[None], chunks, group.process_group, async_op=True))
    return _after(work, lambda: summed)


def _after(work: Any, result: Pending) -> Pending:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait


def _exchange(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    chunks = _cut(x, split_dim, group.size)
    received = torch.empty_like(chunks)
    with group.sending("all_to_all", chunks, exchanged(group.size)):
        dist.all_to_all_single(received, chunks, group=group.process_group)
    return _join(received, concat_dim)


def _cut(x: Tensor, dim: int, parts: int) -> Tensor:
    """[.., d, ..] -> contiguous [parts, .., d / parts, ..]."""
    if x.shape[dim] % parts:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by the {parts} ranks of its group")
    return x.unflatten(dim, (parts, -1)).movedim(dim % x.ndim, 0).contiguous()


def _join(chunks: Tensor, dim: int) -> Tensor:
    """[parts, .., d, ..] -> contiguous [.., parts * d, ..]."""
    dim %= chunks.ndim - 1
    return chunks.movedim(0, dim).flatten(dim, dim + 1)


def _own(x: Tensor, dim: int, group: Group) -> Tensor:
    """A copy, so that the whole need not be kept for the chunk."""
    if x.shape[dim] % group.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by the {group.size} ranks of its group")
    return x.chunk(group.size, dim)[group.rank].contiguous()


@torch.compiler.disable()
def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return function.apply(*args)  # pyright: ignore[reportReturnType]


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return start_all_reduce(x.clone(memory_format=torch.contiguous_format), group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return start_gather(x, dim, group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _own(grad, ctx.dim, ctx.group), None, None


class _SplitTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return start_gather(grad, ctx.dim, ctx.group)(), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
        ctx.dims, ctx.group = (concat_dim, split_dim), group
        return _exchange(x, split_dim, concat_dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        split_dim, concat_dim = ctx.dims
        return _exchange(grad, split_dim, concat_dim, ctx.group), None, None, None
