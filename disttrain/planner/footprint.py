"""Bytes that the worst rank of a layout holds, by part: `disttrain.memory`'s prediction, and what it leaves out. No torch.

The formulas are those of `memory.zero_bytes` and `costs.activation_bytes`, put together once for what layouts have in common
(a test holds the sum to `memory.predict`). On top come the buffers of communication, and what the device's runtime and the
communication library keep; fragments of the allocator are not counted, since nobody knows them before.
"""

from functools import cache
from math import prod
from typing import Any, NamedTuple

from disttrain import costs, memory
from disttrain.config.schema import Config, Precision
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


class Elements(NamedTuple):
    """Of the parameters of one stage on a rank, of `shards` that ZeRO cuts them over."""

    whole: int
    held: int
    """What ZeRO leaves of them."""
    blocks: int
    """Of the blocks' matrices, which are gathered."""


class Sharing(NamedTuple):
    """What decides the bytes of parameters, gradients and optimizer."""

    tensor: int
    zero: int
    shards: int
    replicas: int
    accumulates: bool
    """More than one micro-batch."""


def sharing_of(layout: Layout, micro_batches: int) -> Sharing:
    """A layout's."""
    data = layout.data * layout.context
    shards = data // layout.replicate if layout.zero else 1
    return Sharing(layout.tensor, layout.zero, shards, data // shards, micro_batches > 1)


class Footprint:
    """Of layouts of one config on one number of ranks."""

    def __init__(self, config: Config, world: int, speeds: Speeds, precision: Precision, pipelines: Pipelines):
        self.config, self.world, self.speeds = config, world, speeds
        self.precision: Precision = precision
        self.pipelines = pipelines
        self._each = costs.state_bytes_per_parameter(precision)
        self._narrow = self._each.compute_copy or self._each.weight
        self.count = cache(self._count)
        self.matrices = cache(self._matrices)
        self.tied = cache(self._tied)
        self.updated = cache(self._updated)
        self.state = cache(self._state)
        self.active, self.holding = cache(self._active), cache(self._holding)

    def worst(self, layout: Layout) -> RankBytes:
        """Of the rank that holds most."""
        return max(self.ranks(layout), key=lambda rank: rank.total)

    def ranks(self, layout: Layout) -> list[RankBytes]:
        """Of all ranks that differ, those that hold most of their kind."""
        virtual, share = virtual_of(layout), self.config.train.global_batch_size // layout.data
        micro = layout.micro_batch or share
        pipeline = layout.schedule, layout.pipeline, virtual
        states = self.state(*pipeline, sharing_of(layout, share // micro))
        recompute: Any = layout.recompute
        each = self.active(micro, layout.tensor, layout.sequence, layout.context, recompute)
        of_rank = self.pipelines.of(*pipeline).of_rank
        runtime, passing = self.runtime(layout), self.passing(layout, micro)
        found = []
        for kind, (state, held) in enumerate(zip(states, self.holding(*pipeline, share // micro), strict=True)):
            active = activations(*each, held)
            buffers = state.buffers + passing + max(0.0, state.flat - active)
            found.append(RankBytes(*state[:4], active, state.feedback, buffers, runtime, of_rank.index(kind)))
        return found

    def runtime(self, layout: Layout) -> float:
        """Of the device's runtime, and of every group of ranks that has a communicator of its own: the world, each axis, and
        first and last stage."""
        if not self.speeds.accelerator:
            return self.speeds.context_bytes
        sharing = sharing_of(layout, 1)
        sizes = [layout.tensor, layout.pipeline, layout.context, layout.data * layout.context]
        sizes += [sharing.replicas, sharing.shards] if layout.zero and layout.replicate > 1 else []
        sizes += [2 if layout.pipeline > 1 else 1]
        groups = int(self.world > 1) + sum(1 for size in sizes if 1 < size < self.world)
        return self.speeds.context_bytes + groups * self.speeds.group_bytes

    def _matrices(self, tensor: int) -> tuple[int, int, int]:
        """Elements of a block's matrices, of the embedding, and of the head with its copy of the decoder, on a tensor
        rank."""
        block, embedding, head = (self.count(Kind(*kind), tensor, 1)
                                  for kind in ((1, False, False), (0, True, False), (0, False, True)))  # fmt: skip
        return block.blocks, embedding.whole, head.whole

    def _tied(self, tensor: int) -> int:
        """Elements of the weight that embedding and head share."""
        _, embedding, head = self.matrices(tensor)
        return embedding + head - self.count(Kind(0, True, True), tensor, 1).whole

    def _updated(self, schedule: str, pipeline: int, virtual: int, tensor: int, shards: int) -> int:
        """Elements that the optimizer of the rank with most of them goes over."""
        found = self.pipelines.of(schedule, pipeline, virtual)
        return max(sum(self.count(found.kinds[n], tensor, shards).held for n in rank) for rank in found.ranks)

    def _count(self, kind: Kind, tensor: int, shards: int) -> Elements:
        model = self.config.model
        block = memory.parameter_shapes(model, range(1), False, False, tensor=tensor)
        ends = memory.parameter_shapes(model, range(0), kind.first, kind.last, tensor=tensor)
        held = matrices = 0
        for name, (rows, *others) in block.items():
            norm = "_norm." in name
            held += prod((rows if norm else -(-rows // shards), *others))
            matrices += 0 if norm else prod((rows, *others))
        rest = sum(prod((-(-rows // shards), *others)) for rows, *others in ends.values())
        whole = kind.layers * sum(map(prod, block.values())) + sum(map(prod, ends.values()))
        return Elements(whole, kind.layers * held + rest, kind.layers * matrices)

    def _state(self, schedule: str, pipeline: int, virtual: int, sharing: Sharing) -> tuple["_State", ...]:
        """Of every kind of rank."""
        found = self.pipelines.of(schedule, pipeline, virtual)
        of_kinds = [self._of_kind(kind, sharing, pipeline) for kind in found.kinds]
        ranks = []
        for kinds in found.ranks:
            summed = _State(*(sum(parts) for parts in zip(*(of_kinds[n] for n in kinds), strict=True)))
            ranks.append(summed._replace(buffers=max(of_kinds[n].buffers for n in kinds)))
        return tuple(ranks)

    def _of_kind(self, kind: Kind, sharing: Sharing, pipeline: int) -> "_State":
        """As `memory.zero_bytes`, and ZeRO's buffers: the flat tensor that a block is gathered in, its gradients, and
        what of them is scattered; the gradients of embedding and head are complete only at the end of a backward
        pass."""
        tensor, zero, shards, replicas, accumulates = sharing
        each, count = self._each, self.count(kind, tensor, shards)
        feedback = self._residuals(kind, sharing)
        fresh = each.weight * self._moments_again(kind, tensor)
        if zero == 0:
            flat = count.whole * each.gradient if pipeline > 1 and replicas > 1 else 0
            return _State(count.whole * each.weight, count.whole * each.compute_copy, count.whole * each.gradient,
                          count.whole * each.optimizer + fresh, feedback, 0, flat)  # fmt: skip
        blocks = count.blocks * min(kind.layers, 2) // max(kind.layers, 1) if zero == 3 else count.blocks
        rest = self.count(Kind(0, kind.first, kind.last), tensor, 1).whole
        copies = blocks * self._narrow + rest * (each.compute_copy + each.weight)
        gradients = count.whole if zero == 1 and accumulates else count.held
        buffers = (2 * self._narrow + each.gradient) * self.matrices(tensor)[0] + each.gradient * rest
        return _State(count.held * each.weight, copies, gradients * each.gradient,
                      count.held * each.optimizer + fresh, feedback, buffers, 0)  # fmt: skip

    def _moments_again(self, kind: Kind, tensor: int) -> int:
        """Elements of matrices, of which 1-bit LAMB keeps fresh second moments."""
        if self.config.compression.codec != "onebit_lamb":
            return 0
        shapes = memory.parameter_shapes(self.config.model, range(kind.layers), kind.first, kind.last, tensor=tensor)
        return sum(prod(shape) for shape in shapes.values() if len(shape) > 1)

    def _residuals(self, kind: Kind, sharing: Sharing) -> int:
        """Error feedback of a stage."""
        if self.config.compression.codec == "none":
            return 0
        return memory.residual_bytes(
            self.config, self.precision, range(kind.layers), kind.first, kind.last, sharing.tensor, sharing.zero,
            sharing.shards * sharing.replicas, sharing.replicas,
        )  # fmt: skip

    def _active(
        self, micro: int, tensor: int, sequence: bool, context: int, recompute: costs.Recompute
    ) -> tuple[costs.ActivationBytes, costs.ActivationBytes]:
        """Of one block and of the head, for one micro-batch."""

        def of(layers: int, head: bool) -> costs.ActivationBytes:
            return costs.activation_bytes(
                self.config.model, self.config.data.sequence_length, micro, self.precision, recompute,
                layers=layers, head=head, tensor=tensor, sequence=sequence, context=context,
            )  # fmt: skip

        return of(1, False), of(0, True)

    def _holding(self, schedule: str, pipeline: int, virtual: int, micro_batches: int) -> tuple["Holding", ...]:
        """Of every kind of rank: as `memory.predict`, every chunk in flight counts as the rank's longest stage."""
        found, holds = self.pipelines.of(schedule, pipeline, virtual), {}
        for at, chunks, heads in self.pipelines.flights(schedule, pipeline, virtual, micro_batches):
            kinds = [found.kinds[n] for n in found.ranks[at]]
            last = any(kind.last for kind in kinds)
            holds[at] = Holding(chunks * max(kind.layers for kind in kinds), heads if last else 0)
        return tuple(holds[at] for at in range(len(found.ranks)))

    def passing(self, layout: Layout, micro: int) -> float:
        """Bytes of gathered positions (sequence parallelism), of keys and values that come and go (ring), and of what
        is sent and received between stages."""
        hidden = micro * self.config.data.sequence_length // layout.context * self.config.model.hidden_size
        found = self._narrow * hidden if layout.sequence else 0
        if layout.context > 1 and layout.context_method == "ring":
            found += 4 * self._narrow * hidden / layout.tensor
        if layout.pipeline > 1:
            found += 2 * self._each.weight * hidden / (layout.tensor if layout.sequence else 1)
        return found


class Holding(NamedTuple):
    """What a rank holds at most of micro-batches in flight."""

    blocks: int
    """Activations of one micro-batch in one block each."""
    heads: int


def activations(block: costs.ActivationBytes, head: costs.ActivationBytes, held: Holding) -> float:
    """Bytes of them, and of the largest that works on top."""
    working = max(block.working if held.blocks else 0.0, head.working if held.heads else 0.0)
    return held.blocks * block.saved + held.heads * head.saved + working


class _State(NamedTuple):
    weights: float
    copies: float
    gradients: float
    optimizer: float
    feedback: float
    buffers: float
    flat: float
    """Copies of all gradients, when they are summed after a pipeline's last micro-batch."""
