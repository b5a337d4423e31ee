"""All measurements of one machine, by all ranks of a world together."""

import math
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from disttrain import hardware
from disttrain.calibration import links, passes, products
from disttrain.calibration.timing import Timed, timed, wait
from disttrain.config.schema import Precision
from disttrain.doctor.software import versions
from disttrain.launch import RankInfo
from disttrain.parallel import world
from disttrain.parallel.collectives import gather_objects
from disttrain.planner.speeds import Attention, Product, Speeds
from disttrain.precision import COMPUTE_DTYPE, choose

FULL = 0.85
"""Ranks compute at full speed together if each reaches this share of what one reaches alone."""
TRIES, TOGETHER_ROUNDS = 3, 9
PATIENCE_S = 600.0
"""A rank that does not measure waits for those that do."""

Say = Callable[[str], None]


class Measurements(NamedTuple):
    """What was measured, and how far its repeats lie apart; the same on all ranks."""

    speeds: Speeds
    versions: dict[str, str]
    threads: int
    """That a rank computes with."""
    together: tuple[tuple[int, float], ...]
    """So many ranks of a host at once, and the share of one's rate that each of them reaches."""
    products: tuple[products.MeasuredProduct, ...]
    """Of the first rank."""
    passes: tuple[passes.Pass, ...]
    operator: Timed
    inside: tuple[links.Measured, ...]
    between: tuple[links.Measured, ...]
    """Empty where there is one host."""
    seconds: float
    """What it took."""


class _Own(NamedTuple):
    """What one rank has measured."""

    products: list[products.MeasuredProduct]
    rates: list[Product]
    attention: list[Attention]
    passes: list[passes.Pass]
    operator: Timed


def measure(info: RankInfo, requested: str, say: Say) -> Measurements:
    """Measure; all ranks of a world of at least two call it together, in a process without a process group. `requested` is a
    precision or "auto"; `say` hears on the first rank what comes next."""
    began = time.perf_counter()
    world.share_cores(info)
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= info.local_world_size
    device = torch.device("cuda", info.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    world.start(info, device.type, PATIENCE_S)
    tell: Say = say if info.rank == 0 else lambda text: None
    try:
        precision = choose(requested, device.type)
        dtype = COMPUTE_DTYPE[precision]
        context_bytes = _held_beside(device)
        tell("how many ranks of a host compute at full speed together")
        together = _together(info, device, dtype)
        active = max(count for count, share in together if share >= FULL)
        alone = products.rate(device, dtype) if info.local_rank < active else math.inf
        rate = min(gather_objects(alone))
        own = _computing(device, dtype, rate, tell) if info.local_rank < active else None
        everyone = [one for one in gather_objects(own) if one is not None]
        tell("links")
        inside, between = _links(info, device)
        group_bytes = max(0.0, _held_beside(device) - context_bytes)
    finally:
        world.stop()
    speeds = _speeds(info, device, precision, active, everyone, inside, between)._replace(
        context_bytes=context_bytes, group_bytes=group_bytes
    )
    first: _Own = everyone[0]
    return Measurements(
        speeds, versions(with_gpus=gpu), torch.get_num_threads(), tuple(together), tuple(first.products),
        tuple(first.passes), first.operator, tuple(inside), tuple(between), time.perf_counter() - began,
    )  # fmt: skip


def _together(info: RankInfo, device: torch.device, dtype: torch.dtype) -> list[tuple[int, float]]:
    """So many ranks of every host at once, and the share of one's rate that the slowest of them reaches: the best of some
    tries, since a machine has slow spells."""
    size = 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    counts = sorted({1, *(1 << i for i in range(1, 10) if 1 << i < info.local_world_size), info.local_world_size})
    seconds: dict[int, float] = {}
    for count in counts * TRIES:
        world.wait_for_all()
        own = timed(lambda: a @ b, device, TOGETHER_ROUNDS).seconds if info.local_rank < count else 0.0
        slowest = max(gather_objects(own))
        seconds[count] = min(slowest, seconds.get(count, math.inf))
    return [(count, seconds[1] / seconds[count]) for count in counts]


def _computing(device: torch.device, dtype: torch.dtype, rate: float, tell: Say) -> _Own:
    """What a rank measures by itself, while others do the same; `rate`, in FLOP/s, says what they can afford."""
    tell("passes over memory, and operators")
    found = [*passes.measure(device, dtype), passes.adamw(device)]
    operator, overhead = passes.operator(device), passes.call(device, dtype).seconds
    sizes = products.sizes(rate * products.LONGEST_SECONDS)
    measured = []
    for at, size in enumerate(sizes):
        if at % 50 == 0:
            tell(f"products: {at} of {len(sizes)} sizes")
        measured.append(products.measure(size, device, dtype))
    tell("attention")
    attention = products.attention(rate, device, dtype)
    return _Own(measured, [one.product(overhead) for one in measured], attention, found, operator)


def _links(info: RankInfo, device: torch.device) -> tuple[list[links.Measured], list[links.Measured]]:
    """Inside hosts, where a host has several ranks, and between them, where there are several."""
    hosts = gather_objects((socket.gethostname(), info.local_rank))
    backend = "nccl" if device.type == "cuda" else "gloo"
    inside = _along([host for host, _ in hosts], info.rank, backend)
    between = _along([str(local_rank) for _, local_rank in hosts], info.rank, backend)
    return tuple(
        links.measure(device, group, dist.get_world_size(group)) if group else [] for group in (inside, between)
    )  # pyright: ignore


def _along(names: list[str], rank: int, backend: str) -> dist.ProcessGroup | None:
    """The ranks with this rank's name; None where there is only one. All ranks make all groups."""
    mine = None
    for name in dict.fromkeys(names):
        ranks = [other for other, its in enumerate(names) if its == name]
        if len(ranks) > 1:
            group = dist.new_group(ranks, backend=backend)
            mine = group if rank in ranks else mine
    return mine  # pyright: ignore[reportReturnType]


def _speeds(
    info: RankInfo, device: torch.device, precision: Precision, active: int, everyone: Sequence[_Own],
    inside: Sequence[links.Measured], between: Sequence[links.Measured],
) -> Speeds:  # fmt: skip
    """Means over the ranks that measured at the same time."""
    gpu, gloo = device.type == "cuda", device.type == "cpu"
    name = torch.cuda.get_device_name(device) if gpu else hardware.cpu_name()
    peak = hardware.peak_flops(name, precision) if gpu else None
    plain = [p.bytes_per_second for own in everyone for p in own.passes if p.operator in passes.PLAIN]
    link = links.link_of(inside or between, gloo)
    notes = () if between else ("no second host was there: the link between hosts is taken to be the one inside",)
    return Speeds(
        device=name,
        source=f"measured {date.today().isoformat()} on {platform.node()} by disttrain calibrate",
        precision=precision,
        products=_each(own.rates for own in everyone),
        memory_bytes=_memory_bytes(device, info),
        memory_bytes_per_second=statistics.mean(plain),
        operator_seconds=statistics.mean(own.operator.seconds for own in everyone),
        ranks_per_host=info.local_world_size,
        at_full_speed=active,
        inside=link,
        between=links.link_of(between, gloo) if between else link,
        accelerator=gpu,
        attention=_each(own.attention for own in everyone),
        peak_flops_per_second=peak[0] if peak else None,
        peak_source=peak[1] if peak else "unknown",
        notes=notes,
    )


def _each(ranks: Iterable[Sequence[Any]]) -> tuple:
    """Points that all ranks have measured, with the mean of their rates."""
    return tuple(
        type(points[0])(*(statistics.mean(values) if isinstance(values[0], float) else values[0]
                          for values in zip(*points, strict=True)))
        for points in zip(*ranks, strict=True)
    )  # fmt: skip


def _memory_bytes(device: torch.device, info: RankInfo) -> float:
    """What one rank may hold."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total / info.local_world_size


def _held_beside(device: torch.device) -> float:
    """Bytes of the device that no tensor and no cache of torch's holds: its runtime's, and the communication library's."""
    if device.type != "cuda":
        return 0.0
    torch.zeros(1, device=device)
    wait(device)
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))
