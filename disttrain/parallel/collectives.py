"""Collectives that count the bytes they are handed; a world of one goes through the same calls and sends nothing."""

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
