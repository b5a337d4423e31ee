"""Bytes that the worst rank of a layout holds, by part: `disttrain.memory`'s prediction, and what it leaves out. No torch.

The formulas are those of `disttrain.moments` and `costs.activation_bytes`, put together once for what layouts have in
common (a test holds the sum to `memory.predict`). On top comes what the device's runtime and the communication library
keep; fragments of the allocator are not counted, since nobody knows them before.
"""

from functools import cache
from typing import Any, NamedTuple

from disttrain import costs, memory, moments
from disttrain.config.schema import Config, ParallelConfig, Precision
from disttrain.moments import Parameters
from disttrain.planner.composition import Kind, Pipelines, virtual_of
from disttrain.planner.speeds import Speeds
from disttrain.verify.layouts import Layout


class RankBytes(NamedTuple):
    """Bytes of one rank at the peak of a step."""

    weights: float
    """Master weights."""
    copies: float
    """In low precision, or gathered."""
    gradients: float
    optimizer: float
    activations: float
    """Of all micro-batches in flight."""
    feedback: float
    """Residuals of coded gradients."""
    buffers: float
    """Of communication: what is gathered, scattered, sent and received at the moment."""
    runtime: float
    """Of the device's runtime and of the communication library."""
    stage: int = 0
    """Pipeline rank, or a rank like it."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self[:8])


class Sharing(NamedTuple):
    """What decides the bytes of parameters, gradients and optimizer."""

    tensor: int
    zero: int
    shards: int
    replicas: int


def sharing_of(layout: Layout) -> Sharing:
    """A layout's."""
    data = layout.data * layout.context
    shards = data // layout.replicate if layout.zero else 1
    return Sharing(layout.tensor, layout.zero, shards, data // shards)


class Static(NamedTuple):
    """Of one kind of rank: elements of its parameters, and bytes that are always there."""

    parameters: Parameters
    weights: float
    optimizer: float
    feedback: float


class Footprint:
    """Of layouts of one config on one number of ranks."""

    def __init__(self, config: Config, world: int, speeds: Speeds, precision: Precision, pipelines: Pipelines):
        self.config, self.world, self.speeds = config, world, speeds
        self.precision: Precision = precision
        self.pipelines = pipelines
        self._each = costs.state_bytes_per_parameter(precision)
        self.bytes = self._each.weight, self._each.compute_copy or self._each.weight
        """Of an element of a master weight, and of what is multiplied."""
        self.skips = memory.may_skip(config, precision)
        """Whether residuals are there twice while a step is undecided."""
        self.count = cache(self._count)
        self.matrices, self.tied, self.updated = cache(self._matrices), cache(self._tied), cache(self._updated)
        self.static, self.active, self.holding = cache(self._static), cache(self._active), cache(self._holding)

    def worst(self, layout: Layout) -> RankBytes:
        """Of the rank that holds most."""
        return max(self.ranks(layout), key=lambda rank: rank.total)

    def ranks(self, layout: Layout) -> list[RankBytes]:
        """Of all ranks that differ, those that hold most of their kind."""
        share = self.config.train.global_batch_size // layout.data
        micro = layout.micro_batch or share
        pipeline = layout.schedule, layout.pipeline, virtual_of(layout)
        recompute: Any = layout.recompute
        method = layout.context_method if layout.context > 1 else "ring"
        axes = layout.tensor, layout.sequence, layout.context, method, layout.pipeline, layout.schedule
        block, head, passing = self.active(micro, recompute, *axes)
        shared = sharing_of(layout)
        replicated = layout.data * layout.context > 1
        moving = moments.Sharing(layout.zero, share // micro > 1, replicated, layout.pipeline > 1, passing)
        of_rank, runtime = self.pipelines.of(*pipeline).of_rank, self.runtime(layout)
        found = []
        for kind, held in enumerate(self.holding(*pipeline, share // micro)):
            static = self.static(*pipeline, kind, shared)
            moving = moving._replace(undecided=static.feedback * self.skips)
            at = moments.moments(static.parameters, moving, held, block, head, *self.bytes)
            most = max(at.values(), key=lambda moment: moment.total)
            found.append(RankBytes(
                static.weights, float(most.copies), float(most.gradients), static.optimizer, float(most.activations),
                static.feedback, float(most.buffers), runtime, of_rank.index(kind),
            ))  # fmt: skip
        return found

    def runtime(self, layout: Layout) -> float:
        """Of the device's runtime, and of every group of ranks that has a communicator of its own: the world, each axis, and
        first and last stage."""
        if not self.speeds.accelerator:
            return self.speeds.context_bytes
        sharing = sharing_of(layout)
        sizes = [layout.tensor, layout.pipeline, layout.context, layout.data * layout.context]
        sizes += [sharing.replicas, sharing.shards] if layout.zero and layout.replicate > 1 else []
        sizes += [2 if layout.pipeline > 1 else 1]
        groups = int(self.world > 1) + sum(1 for size in sizes if 1 < size < self.world)
        return self.speeds.context_bytes + groups * self.speeds.group_bytes

    def _count(self, kind: Kind, tensor: int, shards: int) -> Parameters:
        return memory.of_stage(self.config.model, kind.layers, kind.first, kind.last, tensor, shards)

    def _matrices(self, tensor: int) -> tuple[int, int, int]:
        """Elements of a block's matrices, of the embedding, and of the head with its copy of the decoder, on a tensor
        rank."""
        embedding, head = (self.count(Kind(0, *ends), tensor, 1) for ends in ((True, False), (False, True)))
        return embedding.block, embedding.rest, head.rest

    def _tied(self, tensor: int) -> int:
        """Elements of the weight that embedding and head share."""
        _, embedding, head = self.matrices(tensor)
        return embedding + head - self.count(Kind(0, True, True), tensor, 1).rest

    def _updated(self, schedule: str, pipeline: int, virtual: int, tensor: int, shards: int) -> int:
        """Elements that the optimizer of the rank with most of them goes over."""
        found = self.pipelines.of(schedule, pipeline, virtual)
        return max(sum(self.count(found.kinds[n], tensor, shards).held for n in rank) for rank in found.ranks)

    def _static(self, schedule: str, pipeline: int, virtual: int, rank: int, sharing: Sharing) -> Static:
        """Of a kind of rank, by its place in the pipeline's composition."""
        found, (tensor, zero, shards, replicas) = self.pipelines.of(schedule, pipeline, virtual), sharing
        kinds = [found.kinds[n] for n in found.ranks[rank]]
        parameters = memory.of_rank([self.count(kind, tensor, shards) for kind in kinds])
        optimizer = sum(memory.optimizer_bytes(self.config, self.precision, *kind, tensor, shards) for kind in kinds)
        feedback = 0
        if self.config.compression.codec != "none":
            feedback = sum(
                memory.residual_bytes(self.config, self.precision, range(kind.layers), kind.first, kind.last, tensor, zero,
                                      shards * replicas, replicas)
                for kind in kinds
            )  # fmt: skip
        return Static(parameters, parameters.held * self._each.weight, optimizer, feedback)

    def _active(
        self, micro: int, recompute: costs.Recompute, tensor: int, sequence: bool, context: int, method: Any, pipeline: int,
        schedule: Any,
    ) -> tuple[costs.ActivationBytes, costs.ActivationBytes, float]:  # fmt: skip
        """Of one block and of the head, for one micro-batch, and what a stage hands the next of it."""
        layout = ParallelConfig(tensor=tensor, sequence=sequence, context=context, context_method=method, pipeline=pipeline,
                                schedule=schedule)  # fmt: skip
        device = "cuda" if self.speeds.accelerator else "cpu"
        return memory.activations_of(self.config, self.precision, device, layout, micro, recompute)

    def _holding(self, schedule: str, pipeline: int, virtual: int, micro_batches: int) -> tuple[moments.InFlight, ...]:
        """Of every kind of rank, those of the rank of that kind that holds most."""
        found = self.pipelines.of(schedule, pipeline, virtual)
        most: dict[int, moments.InFlight] = {}
        for rank, kind in enumerate(found.of_rank):
            last = any(found.kinds[n].last for n in found.ranks[kind])
            held = memory.flight(schedule, rank, pipeline, virtual, micro_batches, last)
            if kind not in most or held.chunks > most[kind].chunks:
                most[kind] = held
        return tuple(most[kind] for kind in range(len(found.ranks)))
