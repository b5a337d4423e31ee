"""Speed of collectives between the ranks."""

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

REPEATS = {8: 200, 64 * 1024: 20, 1024 * 1024: 10, 16 * 1024 * 1024: 5}
MESSAGE_BYTES = tuple(REPEATS)
"""The first message is so small that its time is the latency."""
WARM_UP = 3
"""The first ones set up connections and buffers."""

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class LinkSpeed:
    """Time of one all-reduce."""

    backend: str
    message_bytes: int
    seconds: float
    """Median over the repeats, of the slowest rank."""
    bus_bytes_per_second: float
    """2 (n - 1) / n * message_bytes / seconds for n ranks, see `bus_bandwidth`."""


def bus_bandwidth(world_size: int, message_bytes: int, seconds: float) -> float:
    """Bytes per second over each rank's link during an all-reduce: 2 (n - 1) / n * bytes / seconds.

    A ring sends every byte 2 (n - 1) / n times over each link (Patarasuk and Yuan 2009), so that this figure can be
    compared with the link's own bandwidth for any number of ranks; the same formula as in NCCL's tests.
    """
    return 2 * (world_size - 1) / world_size * message_bytes / seconds


def measure_links(world_size: int, device: str) -> list[LinkSpeed]:
    """Time float32 all-reduces of MESSAGE_BYTES between all ranks, which call it together.

    `device` is this rank's: "cpu" goes over gloo, a GPU over NCCL. The default process group is up.
    """
    import torch
    import torch.distributed as dist

    target, backend = torch.device(device), "gloo"
    if target.type == "cuda":
        torch.cuda.set_device(target)
        backend = "nccl"
    group: Any = dist.new_group(backend=backend)
    speeds: list[LinkSpeed] = []
    for message_bytes in MESSAGE_BYTES:
        durations = time_collective("all_reduce", message_bytes, target, group, REPEATS[message_bytes])
        seconds = slowest(statistics.median(durations), target, group)
        speed = bus_bandwidth(world_size, message_bytes, seconds)
        speeds.append(LinkSpeed(backend, message_bytes, seconds, speed))
    return speeds


def time_collective(
    collective: Collective, message_bytes: int, device: "torch.device", group: "dist.ProcessGroup | None", repeats: int
) -> list[float]:
    """Seconds of each call on this rank; all ranks of the group call it together. `message_bytes` are those that are
    reduced, that all ranks have together after a gather, or that each rank sends to the next one while it receives as
    many."""
    import torch
    import torch.distributed as dist

    from disttrain.parallel.collectives import all_gather_flat, reduce_scatter_flat

    ranks, at = dist.get_process_group_ranks(group or dist.group.WORLD), dist.get_rank(group)
    whole = torch.zeros(max(len(ranks), message_bytes // 4) // len(ranks) * len(ranks), device=device)
    part = torch.zeros(len(whole) // len(ranks), device=device)

    def send() -> None:
        onward, back = ranks[(at + 1) % len(ranks)], ranks[at - 1]
        ends = [
            dist.P2POp(dist.isend, whole, onward, group),
            dist.P2POp(dist.irecv, torch.empty_like(whole), back, group),
        ]
        for work in dist.batch_isend_irecv(ends):
            work.wait()

    call = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: all_gather_flat(whole, part, group),
        "reduce_scatter": lambda: reduce_scatter_flat(part, whole, group),
        "send": send,
    }[collective]
    durations: list[float] = []
    for repeat in range(repeats + WARM_UP):
        _wait_for_device(device)
        start = time.perf_counter()
        call()
        _wait_for_device(device)
        if repeat >= WARM_UP:
            durations.append(time.perf_counter() - start)
    return durations


def slowest(seconds: float, device: "torch.device", group: "dist.ProcessGroup | None") -> float:
    """Of all ranks of the group, which call it together."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.item()


def _wait_for_device(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
