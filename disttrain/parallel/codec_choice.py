"""`compression.codec=auto`: which codec makes the steps shortest on this link, by measurements and arithmetic.

Seconds of a codec = coding on this processor + bytes on the wire / bandwidth + latencies, of the slowest rank. What
overlaps the backward pass is not subtracted: on a link that matters there is little of it.
"""

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from disttrain import memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config, GradientCodec
from disttrain.grad_compression.compressor import Compressor
from disttrain.grad_compression.link import Arrival
from disttrain.models import build_model
from disttrain.parallel.collectives import IN_FLIGHT, SEGMENT_BYTES, all_gathered, all_reduced, exchanged
from disttrain.parallel.data import CODED_BUCKET_BYTES
from disttrain.parallel.groups import Group, Groups
from disttrain.stages import layers_of_stages, stage_numbers, virtual_stages

CANDIDATES: tuple[GradientCodec, ...] = ("none", "bf16", "int8", "sign", "topk", "powersgd")
"""What is compared, by what their papers say of the loss; the first is what a fast link gets."""
ENOUGH_ELEMENTS = 1 << 25
"""Of gradients, for measuring how long coding takes; more is multiplied."""
BUCKET_BYTES = 25 << 20
"""DDP's where gradients stay whole."""


@dataclass(frozen=True)
class Speed:
    """A link, as an all-reduce sees it."""

    latency_s: float
    """Seconds of the smallest one."""
    bytes_per_second: float
    """Bytes that leave a rank in a second."""


@dataclass(frozen=True)
class Candidate:
    """What a step costs with a codec."""

    codec: GradientCodec
    wire_bytes: float
    """Bytes that leave a rank."""
    coding_s: float
    """Seconds in which vectors become bytes and back, of the slowest rank."""
    link_s: float
    """Seconds on the link."""

    @property
    def seconds(self) -> float:
        """Together."""
        return self.coding_s + self.link_s


@dataclass(frozen=True)
class Choice:
    """What `auto` has found."""

    ranks: int
    speed: Speed
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        """The one with the fewest seconds."""
        return min(self.candidates, key=lambda candidate: candidate.seconds)

    @property
    def reason(self) -> str:
        """One line."""
        best, none = self.best, self.candidates[0]
        rate = f"{self.speed.bytes_per_second * 8 / 1e6:.3g} Mbit/s and {self.speed.latency_s * 1e3:.2g} ms"
        if best.codec == "none":
            return f"gradients stay whole: with {rate} between {self.ranks} ranks no codec is faster"
        return (
            f"gradient codec {best.codec}: with {rate} between {self.ranks} ranks, {best.seconds:.3g} s a step of coding "
            f"and sending, {none.seconds:.3g} s without a codec"
        )

    def table(self) -> Table:
        """All candidates."""
        table = Table(title=self.reason, title_justify="left", box=None, pad_edge=False)
        for name in ("codec", "MB on the wire", "coding, s", "link, s", "together, s"):
            table.add_column(name, justify="left" if name == "codec" else "right")
        for each in self.candidates:
            style = "bold" if each is self.best else ""
            cells = (
                f"{each.wire_bytes / 1e6:.2f}",
                f"{each.coding_s:.3f}",
                f"{each.link_s:.3f}",
                f"{each.seconds:.3f}",
            )
            table.add_row(each.codec, *cells, style=style)
        return table


def choose(config: Config, groups: Groups, group: Group, device: torch.device) -> Choice:
    """Measure the link of a group and what coding this rank's gradients costs. All ranks of the world call it together.

    `group` has more than one rank.
    """
    speed = measure(group, device)
    shapes, copied, multiple = local_shapes(config, groups)
    candidates = [predict(config, codec, shapes, copied, multiple, group, speed, device) for codec in CANDIDATES]
    slowest = torch.tensor([[each.coding_s, each.link_s] for each in candidates], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # one choice for the whole world
    return Choice(group.size, speed, [
        Candidate(each.codec, each.wire_bytes, *seconds) for each, seconds in zip(candidates, slowest.tolist(), strict=True)
    ])  # fmt: skip


def measure(group: Group, device: torch.device) -> Speed:
    """Time all-reduces that grow until one takes a twentieth of a second."""

    def timed(numbers: int, repeats: int) -> float:
        tensor = torch.zeros(numbers, device=device)
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            dist.all_reduce(tensor, group=group.process_group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(seconds[1:]), device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group.process_group)
        return float(slowest)

    latency, numbers = timed(2, 10), 1 << 16
    while (seconds := timed(numbers, 3)) < 0.05 and numbers < 1 << 26:
        numbers *= 4
    return Speed(latency, all_reduced(group.size) * 4 * numbers / max(seconds - latency, 1e-9))


def local_shapes(config: Config, groups: Groups) -> tuple[Mapping[str, torch.Size], set[str], float]:
    """Shapes of the gradients that this rank sums over the link, which of them other tensor ranks sum copies of, and by how
    much to multiply what they cost.

    Of a model of one's own that is cut over ranks, the whole model's with the part that each rank has.
    """
    mesh, parallel, model = groups.mesh, config.parallel, config.model
    if model.source is not None:
        built = build_model(model, config.run.seed, torch.float32, "meta")
        return {name: p.shape for name, p in built.named_parameters()}, set(), 1 / (mesh.tensor * mesh.pipeline)
    virtual = virtual_stages(parallel.schedule, parallel.virtual_stages) if mesh.pipeline > 1 else 1
    layers = layers_of_stages(model, config.data.sequence_length, mesh.pipeline * virtual)
    numbers = (
        stage_numbers(parallel.schedule, groups.pipeline.rank, mesh.pipeline, virtual) if mesh.pipeline > 1 else [0]
    )
    found: dict[str, torch.Size] = {}
    copied: set[str] = set()
    for number in numbers:
        stage = model, layers[number], number == 0, number == len(layers) - 1
        shapes = memory.parameter_shapes(*stage, mesh.tensor, groups.tensor.rank)
        found |= {name: torch.Size(shape) for name, shape in shapes.items()}
        copied |= memory.copied_parameters(*stage, mesh.tensor)
    shards = mesh.shard * mesh.context if parallel.zero and mesh.replicate > 1 else 1
    return found, copied, 1 / shards


def predict(
    config: Config, codec: GradientCodec, shapes: Mapping[str, torch.Size], copied: Collection[str], multiple: float,
    group: Group, speed: Speed, device: torch.device,
) -> Candidate:  # fmt: skip
    """What a step would cost with a codec; see `Compressor.cover` for those `copied`. Bytes and messages are counted where
    nothing is sent."""
    link, elements = CountingLink(group.size, group.rank), sum(map(prod, shapes.values()))
    if codec == "none":
        wire = 4 * elements * all_reduced(group.size)
        seconds = wire / speed.bytes_per_second + ceil(4 * elements / BUCKET_BYTES) * speed.latency_s
        return Candidate(codec, wire * multiple, 0.0, seconds * multiple)
    compressor = Compressor(with_values(config, {"compression.codec": codec}).compression, link, config.run.seed)
    compressor.cover(shapes, copied)
    buckets, measured = sample(shapes)
    scale = multiple * elements / measured
    gradients = {name: torch.randn(shapes[name], device=device) for bucket in buckets for name in bucket}

    def step(number: int) -> float:
        compressor.begin(number, 1.0, may_skip=False)
        before = {name: gradient.clone() for name, gradient in gradients.items()}
        start = time.perf_counter()
        for bucket in buckets:
            compressor.sum_([(name, before[name]) for name in bucket])
        compressor.keep()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    step(1)
    link.wire_bytes, link.latencies = 0.0, 0
    coding = min(step(2), step(3))
    wire, latencies = scale * link.wire_bytes / 2, scale * link.latencies / 2
    return Candidate(codec, wire, scale * coding, wire / speed.bytes_per_second + latencies * speed.latency_s)


def sample(shapes: Mapping[str, torch.Size]) -> tuple[list[list[str]], int]:
    """Names in buckets like DDP's, of all parameters or of enough of them, and the number of their elements."""
    buckets: list[list[str]] = [[]]
    size = total = 0
    for name, shape in reversed(list(shapes.items())):
        if total >= ENOUGH_ELEMENTS:
            break
        if size >= CODED_BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += 4 * shape.numel()
        total += shape.numel()
    return buckets, total


class CountingLink:
    """A link that sends nothing, and counts what it would send."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = size, rank
        self.wire_bytes = 0.0
        self.latencies = 0
        """How many of them go by; those of messages that are on their way together go by together."""

    def sum(self, tensor: Tensor) -> Tensor:
        """As if the others had zeros."""
        return self._sent(tensor, tensor.nbytes * all_reduced(self.size), 1)()

    def gather(self, tensor: Tensor) -> Arrival:
        """As if all had the same."""
        wire_bytes = tensor.nbytes * all_gathered(self.size)
        return self._sent(tensor.unsqueeze(0).repeat(self.size, 1), wire_bytes, segments(tensor.nbytes))

    def exchange(self, rows: Tensor) -> Arrival:
        """As if all had the same."""
        return self._sent(rows, rows.nbytes * exchanged(self.size), segments(rows.nbytes // self.size))

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to count."""

    def _sent(self, came: Tensor, wire_bytes: float, latencies: int) -> Arrival:
        self.wire_bytes += wire_bytes
        there = self.latencies + latencies

        def arrive() -> Tensor:
            self.latencies = max(self.latencies, there)
            return came

        return arrive


def segments(nbytes: int) -> int:
    """How often a message waits for its latency: segments that are on their way together wait together."""
    return ceil(nbytes / (SEGMENT_BYTES * IN_FLIGHT))
