"""`compression.codec=auto`: which codec makes the steps shortest on this link.

The link is measured. Then a throw-away engine takes real steps with each codec over a link that sends nothing and only
lets the time pass that sending would take (docs/decisions/0007).
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from disttrain.config.load import with_values
from disttrain.config.schema import CandidateCodec, Config, Precision
from disttrain.engines import Batch
from disttrain.engines.native import NativeEngine
from disttrain.grad_compression.compressor import Compressor
from disttrain.grad_compression.link import Arrival
from disttrain.parallel.collectives import IN_FLIGHT, SEGMENT_BYTES, all_gathered, all_reduced, exchanged
from disttrain.parallel.groups import Group, Groups

CLOSE = 1.03
"""Codecs whose step takes at most so many times as long as the shortest are as good: the first of them is taken."""
CHANGED = 2.0
"""A link that is so many times as fast as it was, or as slow, is another one."""
REPEATS, ENOUGH_S, MOST_ROUNDS = 3, 1.0, 6
"""The median is taken of so many steps, or, of short ones, of as many as take so many seconds in no more such rounds."""


@dataclass(frozen=True)
class Speed:
    """A link, as an all-reduce sees it."""

    latency_s: float
    """Seconds of the smallest one."""
    bytes_per_second: float
    """Bytes that leave a rank in a second."""

    def __str__(self) -> str:
        return f"{self.bytes_per_second * 8 / 1e6:.3g} Mbit/s and {self.latency_s * 1e3:.2g} ms"


@dataclass(frozen=True)
class Candidate:
    """What a step costs with a codec, on the slowest rank."""

    codec: CandidateCodec
    wire_bytes: float
    """Bytes of gradients that leave a rank."""
    work_s: float
    """Seconds of a step if sending took no time."""
    link_s: float
    """Seconds in which gradients are on the link."""
    step_s: float
    """Seconds of a step: rehearsed, or the sum of the two, which is the most it can be."""
    rehearsed: bool
    """False where `link_s` or `work_s` alone was too long already."""


@dataclass(frozen=True)
class Choice:
    """What `auto` has found."""

    ranks: int
    speed: Speed
    """Of the link between them."""
    axes: dict[str, Speed]
    """Of every axis of the mesh that has a link."""
    candidates: list[Candidate]
    """Most faithful first."""
    glance_s: float
    """Seconds of `glance` on this link."""
    seconds: float
    """What finding it took."""

    @property
    def best(self) -> Candidate:
        """The first one that is close to the shortest step."""
        shortest = min(candidate.step_s for candidate in self.candidates)
        return next(candidate for candidate in self.candidates if candidate.step_s <= CLOSE * shortest)

    @property
    def reason(self) -> str:
        """One line."""
        best, none = self.best, self.candidates[0]
        link = f"{self.speed} between {self.ranks} ranks"
        if best.codec == "none":
            return f"gradients stay whole: your link is fast enough ({link}); no codec makes steps shorter"
        return (
            f"gradient codec {best.codec}: with {link}, {best.step_s:.3g} s a step, {none.step_s:.3g} s without a codec"
        )

    def table(self) -> Table:
        """All candidates."""
        axes = ", ".join(f"{axis} {speed}" for axis, speed in self.axes.items())
        title, caption = self.reason, f"links: {axes}; found in {self.seconds:.1f} s"
        table = Table(
            title=title, caption=caption, title_justify="left", caption_justify="left", box=None, pad_edge=False
        )
        for name in ("codec", "MB on the wire", "computing and coding, s", "link, s", "step, s"):
            table.add_column(name, justify="left" if name == "codec" else "right")
        for each in self.candidates:
            style = "bold" if each is self.best else ""
            step = f"{each.step_s:.3f}" if each.rehearsed else f"up to {each.step_s:.3f}"
            cells = f"{each.wire_bytes / 1e6:.2f}", f"{each.work_s:.3f}", f"{each.link_s:.3f}", step
            table.add_row(each.codec, *cells, style=style)
        return table


def choose(
    config: Config, groups: Groups, device: torch.device, precision: Precision, micro_batches: Sequence[Batch]
) -> Choice:
    """Measure all links, and rehearse this step with each of `compression.candidates`. All ranks call it together.

    The ranks between which gradients are coded are more than one.
    """
    began = time.perf_counter()
    group = groups.coded(config.parallel.zero)
    speed = measure(group, device)
    candidates = _rehearsed(config, groups, group, speed, device, precision, micro_batches)
    gc.collect()  # the engine's tensors, before there are others
    groups.world.traffic.take()
    axes = _axes(groups, device)
    glance_s = glance(speed, groups, group, device)
    return Choice(group.size, speed, axes, candidates, glance_s, time.perf_counter() - began)


def _axes(groups: Groups, device: torch.device) -> dict[str, Speed]:
    """Axes are measured one after the other, so that none slows another; those of the same ranks once."""
    found: dict[str, Speed] = {}
    seen: set[tuple[int, ...]] = set()
    for axis in ("tensor", "context", "pipeline", "data", "replicate"):
        group: Group = getattr(groups, axis)
        if group.size > 1 and group.ranks not in seen:
            found[axis] = measure(group, device)
            seen.add(group.ranks)
    return found


def changed(choice: Choice, groups: Groups, zero: int, device: torch.device) -> bool:
    """Whether the link is another one now, seen twice. All ranks call it together and hear the same."""
    group = groups.coded(zero)
    for _ in range(2):
        ratio = glance(choice.speed, groups, group, device) / choice.glance_s
        if 1 / CHANGED < ratio < CHANGED:
            return False
    return True


def glance(speed: Speed, groups: Groups, group: Group, device: torch.device) -> float:
    """Seconds of an all-reduce that should take a fiftieth of a second, anywhere in the world."""
    numbers = int(min(max(speed.bytes_per_second / 50 / all_reduced(group.size) / 4, 1 << 12), 1 << 24))
    slowest = torch.tensor(_timed(numbers, REPEATS, group, device), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def measure(group: Group, device: torch.device) -> Speed:
    """Time all-reduces that grow until one takes a twentieth of a second."""
    latency, numbers = _timed(2, 10, group, device), 1 << 16
    while (seconds := _timed(numbers, REPEATS, group, device)) < 0.05 and numbers < 1 << 26:
        numbers *= 4
    return Speed(latency, all_reduced(group.size) * 4 * numbers / max(seconds - latency, 1e-9))


def _timed(numbers: int, repeats: int, group: Group, device: torch.device) -> float:
    """Seconds of an all-reduce of so many float32, of the slowest rank of the group."""
    tensor = torch.zeros(numbers, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group.process_group)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(seconds[1:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group.process_group)
    return float(slowest)


def _rehearsed(
    config: Config, groups: Groups, group: Group, speed: Speed, device: torch.device, precision: Precision,
    micro_batches: Sequence[Batch],
) -> list[Candidate]:  # fmt: skip
    """Steps of an engine that is thrown away afterwards.

    Every codec takes some without waiting, which bounds what it costs from both sides; those that may be the fastest then
    take some in which the link's time passes. Gradients that travel once a step need one micro-batch.
    """
    several = config.parallel.zero > 1 or groups.mesh.pipeline > 1
    batches = micro_batches if several else micro_batches[-1:]
    names: list[CandidateCodec] = list(dict.fromkeys(("none", *config.compression.candidates)))
    link = RehearsedLink(group.size, group.rank, speed, device)
    compressors = {name: with_values(config, {"compression.codec": name}).compression for name in names}
    coded = with_values(config, {"compression.codec": names[-1]})
    compressor = Compressor(coded.compression, link, config.run.seed)
    engine = NativeEngine(coded, groups, device, precision, compressor=compressor)
    number = config.compression.warmup_steps

    def step(batches: Sequence[Batch]) -> float:
        nonlocal number
        number += 1
        dist.barrier()
        start = time.perf_counter()
        engine.step(batches, number, 0.0)
        _wait(device)
        return _slowest(time.perf_counter() - start)

    def visited(name: CandidateCodec, waits: bool, steps: int) -> list[float]:
        compressor.use(compressors[name])
        link.reset(waits)
        return [step(batches) for _ in range(steps)]

    step(batches)  # memory is there and DDP has settled
    works: dict[CandidateCodec, list[float]] = {name: visited(name, False, 2) for name in names}
    rounds = min(ceil(ENOUGH_S / min(works["none"]) / REPEATS), MOST_ROUNDS)
    for name in names * (rounds - 1):  # codecs take turns, since machines have slow spells
        works[name] += visited(name, False, 2)
    more = 0.0  # micro-batches before the last
    if len(batches) < len(micro_batches):
        compressor.use(compressors["none"])
        more = step(micro_batches) - statistics.median(works["none"])
    bounds: dict[CandidateCodec, tuple[float, float, float]] = {}
    for name in names:
        visited(name, False, 1)
        work = max(min(works[name]), min(works["none"]))  # coding is no less work than nothing: that would be noise
        bounds[name] = link.wire_bytes, work, _slowest(link.seconds)
    enough = min(work + seconds for _, work, seconds in bounds.values())
    steps: dict[CandidateCodec, list[float]] = {
        name: [] for name, (_, work, seconds) in bounds.items() if max(work, seconds) < enough
    }
    for name in list(steps) * rounds:
        steps[name] += visited(name, True, REPEATS)
    engine.close()
    found = []
    for name, (wire_bytes, work, seconds) in bounds.items():
        least = max(work, min(statistics.median(steps.get(name, [work + seconds])), work + seconds))
        found.append(Candidate(name, wire_bytes, work + more, seconds, least + more, name in steps))
    return found


def _slowest(seconds: float) -> float:
    """Of all ranks."""
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class RehearsedLink:
    """A link that sends nothing: counts bytes and seconds, and lets the seconds pass where it is told to."""

    def __init__(self, size: int, rank: int, speed: Speed, device: torch.device):
        self.size, self.rank = size, rank
        self._speed, self._device = speed, device
        self.reset(waits=False)

    def reset(self, waits: bool) -> None:
        """Count from 0."""
        self.wire_bytes = 0.0
        self.latencies = 0
        """How many of them go by; those of messages that are on their way together go by together."""
        self._waits, self._free_at = waits, 0.0

    @property
    def seconds(self) -> float:
        """What all that was counted takes, one after the other."""
        return self.wire_bytes / self._speed.bytes_per_second + self.latencies * self._speed.latency_s

    def sum(self, tensor: Tensor) -> Tensor:
        """As if the others had zeros."""
        return self._sent(tensor, tensor.nbytes * all_reduced(self.size), 1)()

    def gather(self, tensor: Tensor) -> Arrival:
        """As if all had the same."""
        wire_bytes = tensor.nbytes * all_gathered(self.size)
        return self._sent(tensor.unsqueeze(0).repeat(self.size, 1), wire_bytes, _segments(tensor.nbytes))

    def exchange(self, rows: Tensor) -> Arrival:
        """As if all had the same."""
        return self._sent(rows, rows.nbytes * exchanged(self.size), _segments(rows.nbytes // self.size))

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to count."""

    def _sent(self, came: Tensor, wire_bytes: float, latencies: int) -> Arrival:
        self.wire_bytes += wire_bytes
        all_latencies = self.latencies + latencies
        there = 0.0
        if self._waits:
            _wait(self._device)
            self._free_at = max(time.perf_counter(), self._free_at) + wire_bytes / self._speed.bytes_per_second
            there = self._free_at + latencies * self._speed.latency_s

        def arrive() -> Tensor:
            self.latencies = max(self.latencies, all_latencies)
            if self._waits:
                time.sleep(max(there - time.perf_counter(), 0.0))
            return came

        return arrive


def _segments(nbytes: int) -> int:
    """How often a message waits for its latency: segments that are on their way together wait together."""
    return ceil(nbytes / (SEGMENT_BYTES * IN_FLIGHT))
