"""Gradients between the backward pass and the update: completed, measured and scaled, wherever their shards are."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.grad_compression.compressor import Compressor
from disttrain.parallel.collectives import all_reduced, reduce_over
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.sharding import LocalParameter

BUCKET_BYTES = 32 << 20
"""Largest flat buffer of `sum_over`, bytes."""


def sum_over(group: Group, tensors: Iterable[Tensor]) -> None:
    """Sum tensors over a group in place, in flat buffers of at most 32 MiB that overlap their copies."""
    if group.size == 1:
        return
    pending = []
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        with group.sending("all_reduce", flat, all_reduced(group.size)) as until:
            work = until(dist.all_reduce(flat, group=group.process_group, async_op=True))
        pending.append((work, flat, bucket))
    for work, flat, bucket in pending:
        work.wait()
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def sum_tied(parameters: list[LocalParameter], tied: Mapping[str, str], groups: Groups) -> None:
    """Add the gradients of a weight that two stages hold: the embedding on the first, the head's copy on the last.

    Both then update it alike (Narayanan et al. 2021, section 2.2). On a V-shaped schedule both stages are on one rank.
    """
    for name, source in tied.items():
        copy = next((p.gradient for p in parameters if p.shard.name == name and p.shard.tied_to), None)
        first = next((p.gradient for p in parameters if p.shard.name == source), None)
        if copy is not None and first is not None:
            first += copy
            copy.copy_(first)
        elif copy is not None or first is not None:
            sum_over(groups.tie, [gradient for gradient in (first, copy) if gradient is not None])


def complete(
    parameters: list[LocalParameter], groups: Groups, tied: Mapping[str, str], reduced: bool,
    compressor: Compressor | None = None, data: Group | None = None, late: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> None:  # fmt: skip
    """Sum what neither DDP nor FSDP2 has summed: all plain gradients over the data ranks (or `data`) unless `reduced`, those
    of norms and biases that saw some positions only over the tensor ranks, and the two of a weight on two stages. A
    `compressor` sums whole gradients, and sharded ones over the replicas. What comes `late`, `scale` times, is added."""
    plain = [p for p in parameters if p.gradient is not None and not isinstance(p.parameter, DTensor)]
    sharded = [p for p in parameters if p.gradient is not None and isinstance(p.parameter, DTensor)]
    if compressor is None or sharded:  # ZeRO leaves nothing plain but norms
        sum_over(data or groups.data, _present(plain) if not reduced else ())
    elif not reduced:
        compressor.sum_([(p.shard.name, g) for p in plain if (g := p.gradient) is not None])
    if compressor is not None and sharded and groups.mesh.replicate > 1:
        compressor.sum_([(p.shard.name, g) for p in sharded if (g := p.gradient) is not None])
    sum_over(groups.tensor, _present(p for p in parameters if p.shard.partial))
    for p in parameters if late else ():
        if late and p.shard.name in late and (gradient := p.gradient) is not None:
            gradient.add_(late[p.shard.name], alpha=scale)
    sum_tied(parameters, tied, groups)


def global_norm(parameters: list[LocalParameter], groups: Groups, device: torch.device) -> Tensor:
    """2-norm of the gradient of the whole model, the same scalar on every rank, bit for bit.

    Every rank adds the squares of its shards, in float64, each divided by the number of ranks that hold a copy; one sum
    over the world makes it whole. It is infinite or NaN on all ranks if a gradient is on one of them.
    """
    square, dtype = _square(parameters, device)
    return reduce_over(groups.world, square).sqrt().to(dtype)


def workers_norms(parameters: list[LocalParameter], groups: Groups, workers: Group, device: torch.device) -> Tensor:
    """The same of every worker's own gradient, by their rank in `workers`."""
    square, dtype = _square(parameters, device)
    squares = torch.zeros(workers.size, dtype=square.dtype, device=device)
    squares[workers.rank] = square * workers.size  # a worker's copies are not those of others
    return reduce_over(groups.world, squares).sqrt().to(dtype)


def _square(parameters: list[LocalParameter], device: torch.device) -> tuple[Tensor, torch.dtype]:
    """This rank's part of the squared norm, in float64, and the gradients' type."""
    held = [p for p in parameters if p.gradient is not None]
    norms = torch._foreach_norm(_present(held))
    squares = torch.stack([norm.to(device) for norm in norms]).double().square()
    return (squares * torch.stack([p.share for p in held])).sum(), norms[0].dtype


def multiply(parameters: list[LocalParameter], factor: Tensor | float) -> None:
    """Scale all gradients in place."""
    gradients = _present(parameters)
    for device in {gradient.device for gradient in gradients}:
        here = [gradient for gradient in gradients if gradient.device == device]
        torch._foreach_mul_(here, factor.to(device) if isinstance(factor, Tensor) else factor)


def _present(parameters: Iterable[LocalParameter]) -> list[Tensor]:
    """The gradients that are there; a backward pass does not reach a parameter without effect on the loss."""
    return [gradient for p in parameters if (gradient := p.gradient) is not None]


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size, dtype = 0, None
    for tensor in tensors:
        if not buckets or dtype != tensor.dtype or size + tensor.nbytes > BUCKET_BYTES:
            buckets.append([])
            size, dtype = 0, tensor.dtype
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets
