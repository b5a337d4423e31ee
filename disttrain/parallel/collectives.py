"""Collectives that count the bytes they are handed; a world of one goes through the same calls and sends nothing."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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


def all_reduce(
    tensor: Tensor, traffic: Traffic | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce in place over the world and return the tensor."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)
    if traffic is not None:
        traffic.add(tensor)
    return tensor


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
