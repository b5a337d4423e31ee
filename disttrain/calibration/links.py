"""Latency and bandwidth of the collectives between ranks, and of the link that explains them all best.

A collective of B bytes over n ranks takes s latencies and c B / bandwidth (Hockney 1994; rings: Thakur et al. 2005):

    all-reduce      s = 2 (n - 1)    c = 2 (n - 1) / n
    all-gather      s = n - 1        c = (n - 1) / n
    reduce-scatter  as an all-gather; over gloo, which all-reduces, as an all-reduce
    send            s = 1            c = 1, all ranks sending to the next one at the same time
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from disttrain.calibration.timing import summary
from disttrain.doctor.links import Collective, slowest, time_collective
from disttrain.planner.speeds import Link

REPEATS = {8: 40, 4 << 10: 40, 64 << 10: 20, 1 << 20: 10, 16 << 20: 5}
"""Of each message size in bytes."""
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "send")


class Point(NamedTuple):
    """One message size, on the slowest rank."""

    message_bytes: int
    seconds: float
    spread: float


class Measured(NamedTuple):
    """One collective over some ranks."""

    collective: Collective
    ranks: int
    points: tuple[Point, ...]
    link: Link
    """Fitted to these points alone."""


def measure(device: torch.device, group: dist.ProcessGroup | None, ranks: int) -> list[Measured]:
    """All collectives over a group, whose ranks call this together."""
    found = []
    for collective in COLLECTIVES:
        points = []
        for message_bytes, repeats in REPEATS.items():
            one = summary(time_collective(collective, message_bytes, device, group, repeats))
            points.append(Point(message_bytes, slowest(one.seconds, device, group), one.spread))
        gloo = device.type == "cpu"
        found.append(Measured(collective, ranks, tuple(points), fitted([(collective, points)], ranks, gloo)))
    return found


def link_of(measured: Sequence[Measured], gloo: bool) -> Link:
    """The one link that explains all collectives best."""
    return fitted([(m.collective, m.points) for m in measured], measured[0].ranks, gloo)


def fitted(collectives: Sequence[tuple[Collective, Sequence[Point]]], ranks: int, gloo: bool) -> Link:
    """Latency and bandwidth with the least squares of relative errors; neither is below zero."""
    rows = []
    for collective, points in collectives:
        latencies, share = _factors(collective, ranks, gloo)
        rows += [(latencies / p.seconds, share * p.message_bytes / p.seconds) for p in points]
    a, b, c = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    u, v = (sum(row[i] for row in rows) for i in (0, 1))
    latency, inverse = (c * u - b * v) / (a * c - b * b), (a * v - b * u) / (a * c - b * b)
    if latency < 0:
        latency, inverse = 0.0, v / c
    if inverse <= 0:  # no message was long enough to see it
        latency, inverse = u / a, statistics.median(row[0] for row in rows) * 1e-18
    return Link(latency, 1 / inverse)


def _factors(collective: Collective, ranks: int, gloo: bool) -> tuple[float, float]:
    """s and c."""
    if collective == "send":
        return 1.0, 1.0
    twice = 2 if collective == "all_reduce" or (collective == "reduce_scatter" and gloo) else 1
    return twice * (ranks - 1), twice * (ranks - 1) / ranks
