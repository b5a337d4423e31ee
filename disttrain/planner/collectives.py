"""Seconds of collectives by latency and bandwidth, and which ranks of a group share a host. No torch.

Rings: over n ranks an all-gather or a reduce-scatter of B bytes moves (n - 1) / n B over every link in n - 1 steps, an
all-reduce twice that (Patarasuk and Yuan 2009; Thakur et al. 2005). The steps that cross hosts take the latency between
hosts, the others that inside (as NCCL's own model, src/graph/tuning.cc).
"""

import math
from typing import NamedTuple

from disttrain.planner.speeds import Link, Speeds


class Ring(NamedTuple):
    """The ranks of a group as collectives see them."""

    ranks: int
    hosts: int
    """Hosts that the group touches."""
    beside: int
    """Ranks of the group on one host, at most."""
    inside: Link
    between: Link
    accelerator: bool
    taken: float = 0.0
    """Share of a device that a collective takes from what is computed beside it."""

    @property
    def bytes_per_second(self) -> float:
        """Of a ring's slowest link. As many rings as ranks of the group on a host leave it beside each other, each over its
        rank's end of the network."""
        if self.hosts == 1:
            return self.inside.bytes_per_second
        across = self.beside * self.between.bytes_per_second
        return across if self.beside == 1 else min(across, self.inside.bytes_per_second)

    @property
    def steps_seconds(self) -> float:
        """Latency of n - 1 steps round the ring."""
        across = self.hosts - 1
        return (self.ranks - 1 - across) * self.inside.latency_seconds + across * self.between.latency_seconds

    @property
    def hidden(self) -> bool:
        """Whether messages travel beside computation: not those inside a host of CPUs, which its cores copy and add."""
        return self.accelerator or self.hosts > 1


def ring(speeds: Speeds, world: int, ranks: int, stride: int) -> Ring:
    """Of `ranks` ranks, each `stride` apart, in a world that fills one host after the other.

    Where the groups on an axis are placed unlike each other, that of the worst: one that straddles two hosts.
    """
    host = min(speeds.ranks_per_host, world)
    span = ranks * stride
    if ranks == 1 or (span <= host and host % span == 0) or world <= host:
        hosts, beside = 1, ranks
    elif span <= host:
        hosts, beside = 2, max(1, ranks // 2)
    else:
        beside = max(1, host // stride)
        hosts = math.ceil(ranks / beside)
    return Ring(ranks, hosts, beside, speeds.inside, speeds.between, speeds.accelerator, speeds.collective_share)


def all_gather(group: Ring, whole_bytes: float) -> float:
    """Seconds until every rank has the whole."""
    if group.ranks == 1:
        return 0.0
    return group.steps_seconds + (group.ranks - 1) / group.ranks * whole_bytes / group.bytes_per_second


def reduce_scatter(group: Ring, whole_bytes: float) -> float:
    """Seconds until every rank has the sum of its part. gloo all-reduces and drops what it did not want."""
    return all_gather(group, whole_bytes) if group.accelerator else all_reduce(group, whole_bytes)


def all_reduce(group: Ring, whole_bytes: float) -> float:
    """Seconds until every rank has the sum: round a ring, or, as NCCL may, up and down a tree of hosts, whose latency grows
    with the logarithm of their number and which reaches nine tenths of the bandwidth (src/graph/tuning.cc)."""
    if group.ranks == 1:
        return 0.0
    ring_seconds = 2 * all_gather(group, whole_bytes)
    if not group.accelerator:
        return ring_seconds
    steps = (group.beside - 1) * group.inside.latency_seconds
    steps += math.log2(group.hosts) * group.between.latency_seconds
    return min(ring_seconds, 2 * (steps + whole_bytes / (0.9 * group.bytes_per_second)))


def all_to_all(group: Ring, whole_bytes: float) -> float:
    """Seconds until each of the n equal parts of every rank's bytes is where it belongs; each rank sends to all others, to
    those on other hosts over its own end of the network."""
    if group.ranks == 1:
        return 0.0
    part = whole_bytes / group.ranks
    near, far = group.beside - 1, group.ranks - group.beside
    near_seconds = near * part / group.inside.bytes_per_second
    far_seconds = far * part / group.between.bytes_per_second if far else 0.0
    return group.steps_seconds + max(near_seconds, far_seconds)


def send(group: Ring, message_bytes: float) -> float:
    """Seconds of a message to the next rank of the ring: over the slower link, if any of them is between hosts."""
    if group.ranks == 1:
        return 0.0
    link = group.between if group.hosts > 1 else group.inside
    return link.latency_seconds + message_bytes / link.bytes_per_second


def exposed(group: Ring, communication: float, computation: float) -> float:
    """What a communication adds to a computation that runs beside it: what is left of it, and what it takes of the
    device."""
    if not group.hidden:
        return communication
    return max(0.0, communication - computation) + group.taken * min(communication, computation)
