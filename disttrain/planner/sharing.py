"""Seconds of data parallelism: gradients summed by DDP or after a pipeline, weights gathered and gradients scattered by
ZeRO.

As `disttrain.parallel.data` and `parallel.gradients` do it. No torch. Letters: e elements of a block's matrices on a rank, R
those of what is no block (embedding, head) on its stage, L its blocks, M micro-batches; f and b seconds of a block's forward
and backward pass.
"""

from typing import NamedTuple

from disttrain.planner.collectives import Ring, all_gather, all_reduce, exposed, reduce_scatter
from disttrain.planner.execution import Execution
from disttrain.planner.kernels import Kernels

DDP_BUCKET_BYTES = 25 << 20
"""torch's own."""
SUM_BUCKET_BYTES = 32 << 20
"""As `disttrain.parallel.gradients.BUCKET_BYTES`."""


class Held(NamedTuple):
    """One stage's parameters on a rank, before ZeRO cuts them."""

    blocks: int
    """L."""
    block_elements: int
    """e."""
    other_elements: int
    """R."""

    @property
    def elements(self) -> int:
        """All of them; the norms, half a per cent of a block, are not among them."""
        return self.blocks * self.block_elements + self.other_elements


class Groups(NamedTuple):
    """The ranks that hold the same weights."""

    shard: Ring
    """shard x context, over which ZeRO cuts."""
    replicate: Ring
    data: Ring
    """replicate x shard x context: all whose gradients are summed."""


class Shared(NamedTuple):
    """What data parallelism costs one stage."""

    forward_pass: float = 0.0
    """Seconds of a micro-batch's forward pass: weights converted, or copied out of what was gathered."""
    backward_pass: float = 0.0
    """The same of its backward pass: gradients converted, added up, copied into what is scattered."""
    forward_waits: float = 0.0
    """Seconds for messages in every forward pass that nothing hides."""
    backward_waits: float = 0.0
    once_waits: float = 0.0
    """The same once a step, in the first or the last micro-batch."""
    after: float = 0.0
    """Seconds once a step, when all micro-batches are done."""


class Messages(NamedTuple):
    """Seconds of a stage's collectives under ZeRO: of one block, and of what is no block."""

    gather: float
    scatter: float
    between: float
    """Sums between replicas of what is sharded."""
    other_gather: float
    other_scatter: float
    other_between: float


def messages(held: Held, groups: Groups, execution: Execution) -> Messages:
    """Blocks are gathered in the type that is multiplied, all else, and gradients, in master precision."""
    narrow, wide, shards = execution.narrow, execution.master, groups.shard.ranks
    block, other = held.block_elements, held.other_elements
    return Messages(
        all_gather(groups.shard, narrow * block),
        reduce_scatter(groups.shard, wide * block),
        all_reduce(groups.replicate, wide * block / shards),
        all_gather(groups.shard, wide * other),
        reduce_scatter(groups.shard, wide * other),
        all_reduce(groups.replicate, wide * other / shards),
    )


def sharded(
    zero: int, held: Held, groups: Groups, sent: Messages, kernels: Kernels, execution: Execution,
    micro_batches: int, forward: float, backward: float,
) -> Shared:  # fmt: skip
    """One stage under ZeRO 1, 2 or 3; `forward` and `backward` are f and b."""
    narrow, wide, count = execution.narrow, execution.master, held.blocks
    out, into = kernels.passes(2 * narrow * held.elements), kernels.passes((narrow + wide) * held.elements)
    first = _in_turn(groups.shard, sent.gather, forward, count) + sent.other_gather
    scattered = _in_turn(groups.shard, sent.scatter, backward, count) + sent.other_scatter
    replicas = sent.other_between
    if groups.replicate.ranks > 1:  # what the last micro-batch waits longer
        replicas += _in_turn(groups.replicate, sent.scatter + sent.between, backward, count)
        replicas -= _in_turn(groups.replicate, sent.scatter, backward, count)
    if zero == 3:
        again = _in_turn(groups.shard, sent.gather + sent.scatter, backward, count) + sent.other_scatter
        return Shared(out, out + into, first, again, replicas)
    if zero == 2:
        return Shared(out / micro_batches, into, 0.0, scattered, first + replicas)
    added = kernels.passes((narrow + 2 * wide) * held.elements) if micro_batches > 1 else 0.0
    return Shared(out / micro_batches, added + into / micro_batches, 0.0, 0.0, first + scattered + replicas)


def _in_turn(group: Ring, message: float, computation: float, count: int) -> float:
    """Seconds that `count` blocks wait when the message of one travels while the next one is computed: the first waits for
    its whole."""
    return 0.0 if count == 0 else message + (count - 1) * exposed(group, message, computation)


def replicated(
    held: Held, groups: Groups, kernels: Kernels, execution: Execution, pipeline: int, backward: float
) -> Shared:
    """One stage without ZeRO. DDP sums buckets from the end of the model on, while the last micro-batch's backward pass
    goes on: all but the last bucket may hide behind it. In a pipeline they are summed when the schedule is done,
    through flat copies."""
    total = execution.master * held.elements
    converted = kernels.passes(execution.cast_bytes * held.elements)
    gradients = kernels.passes(execution.gradient_bytes * held.elements)
    if pipeline > 1:
        copies = kernels.passes(4 * total) if groups.data.ranks > 1 else 0.0
        return Shared(converted, gradients, after=copies + _bucketed(groups.data, total, SUM_BUCKET_BYTES))
    size = min(total, DDP_BUCKET_BYTES)
    hidden = held.blocks * backward * (1 - size / total) if total else 0.0
    waits = exposed(groups.data, _bucketed(groups.data, total, DDP_BUCKET_BYTES), hidden)
    return Shared(converted, gradients, once_waits=max(all_reduce(groups.data, size), waits))


def _bucketed(group: Ring, total: float, most: float) -> float:
    """Seconds of sums in buckets of at most so many bytes, one after the other."""
    size = min(total, most)
    return total / size * all_reduce(group, size) if size else 0.0
