"""Collectives that count the bytes they are handed; a world of one goes through the same calls and sends nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain import ranges

if TYPE_CHECKING:
    from disttrain.parallel.groups import Group


class Counted(NamedTuple):
    """Bytes of one rank in some time."""

    handed: int = 0
    """Payload handed to collectives."""
    uncompressed: int = 0
    """The same, had no codec been used."""
    on_wire: float = 0.0
    """What leaves the rank when rings carry it (docs/measurement.md)."""


@dataclass
class Traffic:
    """Bytes since the last `take`. Gradients, or changes of weights, may be summed by a thread of their own."""

    total: Counted = Counted()
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, tensor: Tensor, ring: float = 1.0) -> None:
        """Count one tensor, `ring` times its bytes on the wire; nothing leaves a rank that is alone."""
        if dist.get_world_size() > 1:
            self.count(tensor.nbytes, tensor.nbytes, ring * tensor.nbytes)

    def count(self, handed: int, uncompressed: int, on_wire: float) -> None:
        """Count bytes."""
        with self._lock:
            before = self.total
            self.total = Counted(before.handed + handed, before.uncompressed + uncompressed, before.on_wire + on_wire)

    def take(self) -> Counted:
        """What was counted since the last call."""
        with self._lock:
            taken, self.total = self.total, Counted()
        return taken


def all_reduced(ranks: int) -> float:
    """How many times its payload leaves a rank in a ring all-reduce (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks


def all_gathered(ranks: int) -> float:
    """The same for an all-gather of each rank's payload."""
    return ranks - 1


def exchanged(ranks: int) -> float:
    """The same for an all-to-all of the whole payload."""
    return (ranks - 1) / ranks


def reduce_scattered(ranks: int, device: torch.device) -> float:
    """The same for a reduce-scatter of the whole payload. gloo all-reduces and drops what it did not want."""
    return all_reduced(ranks) if device.type == "cpu" else (ranks - 1) / ranks


def reduce_over(group: "Group", tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over a group, counting its bytes, and return the tensor."""
    if group.size > 1:
        with group.sending("all_reduce", tensor, all_reduced(group.size)):
            dist.all_reduce(tensor, op=op, group=group.process_group)
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


SEGMENT_BYTES, IN_FLIGHT = 1 << 17, 2
"""Over gloo, messages are cut into segments of so much for each rank; its threads have so many on their way at once."""


def _in_segments(rows: Tensor, output: Tensor, start: Callable[[Tensor, Tensor], Any]) -> Callable[[], Tensor]:
    """Begin to send [m, n] and to receive [ranks, n], over gloo some columns at a time; waits for the output.

    A long message fills the queues of a slow link in both directions; acknowledgements then wait behind data, packets are
    dropped, and TCP reaches half the rate (measured at 100 Mbit/s and 1 Gbit/s: docs/decisions/0007).
    """
    n = rows.shape[1]
    width = max(1, n if rows.device.type != "cpu" else SEGMENT_BYTES // rows.itemsize)
    segments: list[tuple[Any, Tensor, Tensor, Tensor]] = []
    for part, place in zip(rows.split(width, 1), output.split(width, 1), strict=True):
        sent, received = part.contiguous(), place if place.is_contiguous() else torch.empty_like(place).contiguous()
        segments.append((start(received.view(-1), sent.view(-1)), sent, received, place))

    def arrive() -> Tensor:
        for work, _, received, place in segments:
            work.wait()
            if received is not place:
                place.copy_(received)
        return output

    return arrive


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
        with ranges.communication(self.group.axis, "all_reduce", tensor.device):
            dist.all_reduce(tensor, group=self.group.process_group)
        self.group.traffic.count(tensor.nbytes, 0, all_reduced(self.size) * tensor.nbytes)
        return tensor

    def gather(self, tensor: Tensor) -> Callable[[], Tensor]:
        """All-gather [n] into [ranks, n]."""

        def start(output: Tensor, part: Tensor) -> Any:
            with ranges.communication(self.group.axis, "all_gather", part.device) as until:
                return until(all_gather_flat(output, part, self.group.process_group, async_op=True))

        gathered = tensor.new_empty(self.size, tensor.numel())
        self.group.traffic.count(tensor.nbytes, 0, all_gathered(self.size) * tensor.nbytes)
        return _in_segments(tensor.unsqueeze(0), gathered, start)

    def exchange(self, rows: Tensor) -> Callable[[], Tensor]:
        """All-to-all of the rows of [ranks, n]."""

        def start(output: Tensor, part: Tensor) -> Any:
            with ranges.communication(self.group.axis, "all_to_all", part.device) as until:
                return until(dist.all_to_all_single(output, part, group=self.group.process_group, async_op=True))

        got = torch.empty_like(rows, memory_format=torch.contiguous_format)
        self.group.traffic.count(rows.nbytes, 0, exchanged(self.size) * rows.nbytes)
        return _in_segments(rows, got, start)

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Count what would have been handed over without a codec."""
        self.group.traffic.count(0, sum(tensor.nbytes for tensor in tensors), 0.0)


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Which flags are up on any rank. Goes over the hosts (gloo), so that no GPU is waited for."""
    if dist.get_world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    with ranges.communication("world", "all_reduce", votes.device):
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """The value of every rank, in order of rank, on every rank; over a group of all ranks, if given."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered
