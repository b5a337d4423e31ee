"""Collectives that count the bytes they are handed; a world of one goes through the same calls and sends nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from disttrain.parallel.groups import Group


@dataclass
class Traffic:
    """Bytes this rank handed to collectives since the last `take`: payload before any algorithm's own overhead."""

    sent: int = 0
    uncompressed: int = 0

    def add(self, tensor: Tensor) -> None:
        """Count one tensor; nothing leaves a rank that is alone."""
        if dist.get_world_size() > 1:
            self.sent += tensor.nbytes
            self.uncompressed += tensor.nbytes

    def take(self) -> tuple[int, int]:
        """(bytes sent, bytes without compression) since the last call."""
        taken = (self.sent, self.uncompressed)
        self.sent = self.uncompressed = 0
        return taken


def reduce_over(group: "Group", tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over a group, counting its bytes, and return the tensor."""
    if group.size > 1:
        dist.all_reduce(tensor, op=op, group=group.process_group)
        group.traffic.add(tensor)
    return tensor


def all_gather_flat(output: Tensor, part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Concatenate every rank's `part` into `output` along dim 0; torch 2.13 renamed what torch 2.11 has."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, part, group=group, async_op=async_op)


def reduce_scatter_flat(
    output: Tensor, whole: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM, async_op: bool = False
) -> Any:
    """Reduce `whole` over the ranks and give each its part along dim 0; torch 2.13 renamed what torch 2.11 has."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, whole, op=op, group=group, async_op=async_op)


@dataclass(frozen=True)
class GroupLink:
    """The ranks of a group as a codec's link; see `disttrain.grad_compression.link.Link`."""

    group: "Group"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size

    @property
    def rank(self) -> int:
        """Place of this rank among them."""
        return self.group.rank

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place."""
        dist.all_reduce(tensor, group=self.group.process_group)
        self.group.traffic.sent += tensor.nbytes
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather [n] into [ranks, n]."""
        gathered = tensor.new_empty(self.size * tensor.numel())
        all_gather_flat(gathered, tensor.contiguous(), self.group.process_group)
        self.group.traffic.sent += tensor.nbytes
        return gathered.view(self.size, -1)

    def exchange(self, rows: Tensor) -> Tensor:
        """All-to-all of the rows of [ranks, n]."""
        got = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(got.view(-1), rows.contiguous().view(-1), group=self.group.process_group)
        self.group.traffic.sent += rows.nbytes
        return got

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Count what would have been handed over without a codec."""
        self.group.traffic.uncompressed += sum(tensor.nbytes for tensor in tensors)


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Which flags are up on any rank. Goes over the hosts (gloo), so that no GPU is waited for."""
    if dist.get_world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def gather_objects(value: object) -> list:
    """The value of every rank, in order of rank, on every rank."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
