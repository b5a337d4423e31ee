"""Speed of an all-reduce between the ranks."""

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_REPEATS = {8: 200, 64 * 1024: 20, 1024 * 1024: 10, 16 * 1024 * 1024: 5}
MESSAGE_BYTES = tuple(_REPEATS)
"""The first message is so small that its time is the latency."""


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
    group = dist.new_group(backend=backend)
    speeds: list[LinkSpeed] = []
    for message_bytes in MESSAGE_BYTES:
        tensor = torch.zeros(message_bytes // 4, device=target)
        durations: list[float] = []
        for repeat in range(_REPEATS[message_bytes] + 3):
            _wait_for_device(target)
            start = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            _wait_for_device(target)
            if repeat >= 3:  # the first ones set up connections and buffers
                durations.append(time.perf_counter() - start)
        slowest = torch.tensor([statistics.median(durations)], dtype=torch.float64, device=target)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        seconds = slowest.item()
        speed = bus_bandwidth(world_size, message_bytes, seconds)
        speeds.append(LinkSpeed(backend, message_bytes, seconds, speed))
    return speeds


def _wait_for_device(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
