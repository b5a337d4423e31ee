"""Ring attention: exact attention over a sequence that is split over ranks (Liu et al. 2023).

Queries stay; keys and values go round the ring, the next ones travelling while the product with the present ones runs.
Each product adds to a running maximum, sum and output (online softmax, Milakov and Gimelshein 2018). On the way back
the gradients of keys and values travel with them, one step behind, until they are home. Nothing of size S x S is kept:
the scores are computed again on the way back (Dao et al. 2022).

A causal sequence is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r (zigzag, as Megatron-LM's
context parallelism): of every foreign pair of chunks half is visible to each rank, so all compute the same, and what
is hidden is never computed.

Shapes: B batch, A heads, S this rank's part of the sequence, D head size.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from disttrain import ranges
from disttrain.costs import TILE_ELEMENTS
from disttrain.models.dropout import WeightDropout
from disttrain.parallel.groups import Group


def ring_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: WeightDropout | None,
    group: Group,
) -> Tensor:
    """`layers.attend` of the whole sequence for this rank's queries; all [B, A, S, D], mask bool [B, S] over its keys.

    A causal sequence is split zigzag, any other contiguously. Maximum, sum and output are kept in float32 for half
    precision. A query with no key to attend to gives 0, as torch's scaled_dot_product_attention does. Raises ValueError
    for a mask beside causal, or an odd number of causal positions.
    """
    if mask is not None and causal:
        raise ValueError("attention takes either a mask or causal, not both")
    if causal and query.shape[2] % 2:
        raise ValueError(f"{query.shape[2]} positions a rank are not two chunks: zigzag needs an even number")
    return _Ring.apply(query, key, value, mask, causal, dropout, group)  # pyright: ignore[reportReturnType]


def positions_of(rank: int, size: int, count: int, zigzag: bool, device: torch.device | str | None = None) -> Tensor:
    """The positions in the whole sequence of the `count` tokens that `rank` of `size` holds, ascending int64 [count]."""
    here = torch.arange(count, device=device)
    if not zigzag:
        return here + rank * count
    half = count // 2
    return torch.where(here < half, here + rank * half, here + (2 * size - 2 - rank) * half)


class _Tile(NamedTuple):
    """A rectangle of the scores that is computed in one go."""

    queries: slice
    keys: slice
    diagonal: int | None
    """Query i of the tile sees its keys 0 .. i + diagonal; all of them for None."""


def _tiles(query: Tensor, source: int, causal: bool, group: Group) -> Iterator[_Tile]:
    """What this rank's queries see of the keys of rank `source`, in tiles of bounded size."""
    batch, heads, count, _ = query.shape
    first, last = 0, count
    if causal and source > group.rank:  # both foreign chunks lie between ours: our second one sees both
        first = count // 2
    if causal and source < group.rank:  # both of ours lie between the foreign ones, and see the first
        last = count // 2
    elements = TILE_ELEMENTS.get(query.device.type, TILE_ELEMENTS["cuda"])
    step = max(1, elements // (batch * heads * last))
    for start in range(first, count, step):
        end = min(start + step, count)
        # Our own positions ascend, so among themselves their order is that of the sequence.
        own = causal and source == group.rank
        yield _Tile(slice(start, end), slice(0, end if own else last), start if own else None)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, tile: _Tile) -> Tensor:
    """The tile's scaled scores, -inf where hidden, in float32 or wider."""
    size = query.shape[-1]
    scores = _product(query[:, :, tile.queries] * (1 / math.sqrt(size)), key[:, :, tile.keys].mT)
    if tile.diagonal is not None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + tile.diagonal)
        scores.masked_fill_(hidden, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~mask[:, None, None, tile.keys], -torch.inf)
    return scores


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of the narrower one, given in float32 or wider."""
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    product = torch.matmul(a.to(dtype), b.to(dtype))
    return product.to(torch.promote_types(dtype, torch.float32))


def _dropout_of(
    dropout: WeightDropout | None, tile: _Tile, source: int, causal: bool, group: Group
) -> WeightDropout | None:
    if dropout is None:
        return None
    keys = positions_of(source, group.size, len(dropout.keys), causal, dropout.keys.device)
    return dropout._replace(queries=dropout.queries[tile.queries], keys=keys[tile.keys])


def _rounds(
    key: Tensor, value: Tensor, mask: Tensor | None, group: Group
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Every rank's (number, keys and values [2, B, A, S, D], mask), our own first; the next ones are on their way."""
    present = [torch.stack((key, value))] + ([] if mask is None else [mask.contiguous()])
    for step in range(group.size):
        following = _pass_on(present, group, 0) if step + 1 < group.size else lambda: []
        yield (group.rank - step) % group.size, present[0], present[1] if len(present) > 1 else None
        present = following()


def _pass_on(tensors: list[Tensor], group: Group, tag: int) -> Callable[[], list[Tensor]]:
    """Start sending to the next rank; the result waits for what the previous one sends. Tags part kinds of messages."""
    onward, back = group.ranks[(group.rank + 1) % group.size], group.ranks[(group.rank - 1) % group.size]
    received = [torch.empty_like(tensor) for tensor in tensors]
    operations = []
    for i, (ours, theirs) in enumerate(zip(tensors, received, strict=True)):
        group.traffic.add(ours)
        operations.append(dist.P2POp(dist.isend, ours, onward, group.process_group, tag + i))
        operations.append(dist.P2POp(dist.irecv, theirs, back, group.process_group, tag + i))
    with ranges.communication(group.axis, "send_and_receive", tensors[0].device):
        works = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received if tensors else []  # `tensors` is held until here: it may still be read by the transfer

    return wait


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        dropout: WeightDropout | None,
        group: Group,
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        total = torch.zeros(query.shape, dtype=wide, device=query.device)
        # Lowest finite numbers, not -inf, so that a row without keys never computes inf - inf.
        top = torch.full((*query.shape[:3], 1), torch.finfo(wide).min, dtype=wide, device=query.device)
        norm = torch.zeros_like(top)
        for source, (keys, values), here in _rounds(key, value, mask, group):
            for tile in _tiles(query, source, causal, group):
                rows = (..., tile.queries, slice(None))
                scores = _scores(query, keys, here, tile)
                higher = torch.maximum(top[rows], scores.amax(-1, keepdim=True))
                shrink = (top[rows] - higher).exp_()
                weights = scores.sub_(higher).exp_()
                norm[rows] = norm[rows] * shrink + weights.sum(-1, keepdim=True)
                dropped = _dropout_of(dropout, tile, source, causal, group)
                if dropped is not None:
                    weights *= dropped.factors(wide)
                total[rows] = total[rows] * shrink + _product(weights, values[..., tile.keys, :])
                top[rows] = higher
        norm.masked_fill_(norm == 0, 1)
        output = (total / norm).to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, output, top + norm.log())
        ctx.causal, ctx.dropout, ctx.group = causal, dropout, group
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, mask, output, log_sum = ctx.saved_tensors
        causal, dropout, group = ctx.causal, ctx.dropout, ctx.group
        grad, wide, scale = grads[0], log_sum.dtype, 1 / math.sqrt(query.shape[-1])
        shared = (grad.to(wide) * output).sum(-1, keepdim=True)  # of a query: sum of weight * its gradient
        grad_query = torch.zeros(query.shape, dtype=wide, device=query.device)
        arriving: Callable[[], list[Tensor]] | None = None
        for source, (keys, values), here in _rounds(key, value, mask, group):
            part = torch.zeros((2, *key.shape), dtype=wide, device=key.device)
            for tile in _tiles(query, source, causal, group):
                rows, columns = (..., tile.queries, slice(None)), (..., tile.keys, slice(None))
                weights = _scores(query, keys, here, tile).sub_(log_sum[rows]).exp_()
                of_weights = _product(grad[rows], values[columns].mT)
                dropped = _dropout_of(dropout, tile, source, causal, group)
                factors = None if dropped is None else dropped.factors(wide)
                if factors is not None:
                    of_weights *= factors
                of_scores = of_weights.sub_(shared[rows]).mul_(weights).mul_(scale)
                grad_query[rows] += _product(of_scores, keys[columns])
                part[0][columns] += _product(of_scores.mT, query[rows])
                part[1][columns] += _product((weights if factors is None else weights * factors).mT, grad[rows])
            if arriving is not None:
                part += arriving()[0]
            # The gradients follow their keys one step behind: after the last step they are at home.
            arriving = (lambda part=part: [part]) if group.size == 1 else _pass_on([part], group, 2)
        assert arriving is not None
        grad_key, grad_value = arriving()[0].to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None, None
