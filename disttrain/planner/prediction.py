"""One layout's step, predicted: seconds by part, and utilisation by every convention. No torch.

`Predictor` remembers what layouts have in common; `predict` is the one call for a single layout.
"""

from functools import cache, cached_property, partial
from operator import mul
from typing import NamedTuple

from disttrain import costs
from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.planner import work
from disttrain.planner.collectives import all_reduce, ring, send
from disttrain.planner.composition import Kind, pipelines, virtual_of
from disttrain.planner.execution import Execution, ours
from disttrain.planner.footprint import Footprint, RankBytes
from disttrain.planner.kernels import kernels
from disttrain.planner.sharing import Groups, Held, Messages, messages, replicated, sharded
from disttrain.planner.speeds import Speeds
from disttrain.planner.timeline import Span, Stages, span
from disttrain.stages import SCHEDULES, layers_of_stages
from disttrain.verify.layouts import Layout

FUSED_BYTES = 28
"""Moved for each element that a rank updates, in fp32: torch's fused kernel reads weight, gradient and moments and
writes all but the gradient."""
FOREACH_BYTES = {
    "adamw": 88, "lamb": 120, "sgd": 44, "adagrad": 64, "rmsprop": 64, "adam": 92, "radam": 104, "adafactor": 68, "muon": 48,
}  # fmt: skip
"""The same where kernels go over all of them in turn, pass by pass; what Muon multiplies and gathers of whole matrices is
not in it."""
SMALL_MESSAGES = 3
"""All-reduces of a few numbers over the world: targets, losses, the gradient's norm."""


class StepParts(NamedTuple):
    """Seconds of the slowest pipeline rank; together the step."""

    compute: float
    """Forward and backward passes, what is recomputed included."""
    tensor: float
    """Waiting for tensor parallelism's messages."""
    context: float
    data: float
    """For gradients and gathered weights: what does not hide behind computation."""
    pipeline: float
    """For messages between stages."""
    bubble: float
    """For other stages."""
    optimizer: float
    """Norm, clipping, update, and the small messages around them."""


class Prediction(NamedTuple):
    """Of one layout."""

    layout: Layout
    step_seconds: float
    parts: StepParts
    memory: RankBytes
    """Of the worst pipeline rank."""
    micro_batches: int
    tokens_per_second: float
    mfu_causal: float | None
    mfu_full: float | None
    hfu: float | None
    bubble_fraction: float
    """Of the pipeline's schedule, as `pipeline_bubble_fraction` in docs/measurement.md: messages between stages included."""

    @property
    def exposed_seconds(self) -> float:
        """Of communication on every axis."""
        return self.parts.tensor + self.parts.context + self.parts.data + self.parts.pipeline


def predict(config: Config, layout: Layout, speeds: Speeds, execution: Execution | None = None) -> Prediction:
    """The step of this config, its vocabulary resolved, under a layout that is legal (`Layout.problems`)."""
    return Predictor(config, layout.world, speeds, execution).of(layout)


class Predictor:
    """Predicts layouts of one config on one number of ranks. What several have in common is computed once."""

    def __init__(self, config: Config, world: int, speeds: Speeds, execution: Execution | None = None):
        self.config, self.world, self.speeds = config, world, speeds
        self.precision: Precision = speeds.precision  # pyright: ignore[reportAttributeAccessIssue]
        self.execution = execution or ours(config, self.precision)
        self.kernels = kernels(speeds)
        self.pipelines = pipelines(self._layers)
        self.footprint = Footprint(config, world, speeds, self.precision, self.pipelines)
        self._blocks, self._ends = cache(self._block), cache(self._end)
        self._costs, self._passes, self._sharing = cache(self._cost), cache(self._pass), cache(self._share)
        self._converted = cache(self._convert)
        self._ring = cache(partial(ring, speeds, world))
        self._small = SMALL_MESSAGES * all_reduce(self._ring(world, 1), 64.0)

    def of(self, layout: Layout) -> Prediction:
        """One layout, with the memory of its worst rank."""
        parts, schedule = self.step(layout)
        return self.prediction(layout, parts, schedule, self.footprint.worst(layout))

    def prediction(self, layout: Layout, parts: StepParts, schedule: Span, memory: RankBytes) -> Prediction:
        """All that follows from a step's parts."""
        config, seconds = self.config, sum(parts)
        batch, peak = config.train.global_batch_size, self.speeds.peak_flops_per_second
        rates = [flops * batch / seconds for flops in self.flops(layout.recompute)]
        full, causal, hardware = (rate / peak / self.world if peak else None for rate in rates)
        return Prediction(
            layout=layout,
            step_seconds=seconds,
            parts=parts,
            memory=memory,
            micro_batches=self._micro_batches(layout)[1],
            tokens_per_second=config.data.sequence_length * batch / seconds,
            mfu_causal=causal,
            mfu_full=full,
            hfu=hardware,
            bubble_fraction=1 - schedule.busy / schedule.total if layout.pipeline > 1 else 0.0,
        )

    def flops(self, recompute: str) -> tuple[float, float, float]:
        """Of one sequence, forward and backward: full square, causal, and computed."""
        model, length = self.config.model, self.config.data.sequence_length
        return (
            costs.training_flops_per_sequence(model, length, False),
            costs.training_flops_per_sequence(model, length, True),
            costs.hardware_flops_per_sequence(model, length, recompute),  # pyright: ignore[reportArgumentType]
        )

    def step(self, layout: Layout) -> tuple[StepParts, Span]:
        """The parts of the step, and the pipeline's schedule."""
        size, count = self._micro_batches(layout)
        shards = layout.data * layout.context // layout.replicate if layout.zero else 1
        cut = (
            size,
            layout.tensor,
            layout.sequence,
            layout.context,
            layout.context_method == "ulysses",
            layout.recompute,
        )
        sharing = (layout.zero, shards, layout.data * layout.context // shards, layout.tensor, layout.pipeline, count)
        pipeline = layout.schedule, layout.pipeline, virtual_of(layout)
        found = self.pipelines.of(*pipeline)
        stages = [self._passes(kind, cut, sharing) for kind in found.kinds]
        schedule = self._schedule(
            pipeline, count, [stage.seconds for stage in stages], self._hidden_seconds(layout, size)
        )
        busiest = max(found.ranks, key=lambda rank: sum(stages[n].seconds for n in rank))
        cost = work.times(work.added(*(stages[n].cost for n in busiest)), count)
        waits = count * sum(stages[n].waits for n in busiest)
        waits += max(stage.once for stage in stages) + max(stage.after for stage in stages)
        parts = StepParts(
            *cost, waits + self._tied(layout, shards), schedule.waits, schedule.bubble, self._optimizer(layout, shards)
        )
        return parts, schedule

    def _micro_batches(self, layout: Layout) -> tuple[int, int]:
        """Sequences of one, and how many a data rank has in a step."""
        share = self.config.train.global_batch_size // layout.data
        size = layout.micro_batch or share
        return size, share // size

    def _layers(self, stages: int) -> list[range]:
        return layers_of_stages(self.config.model, self.config.data.sequence_length, stages)

    def _cost(self, kind: Kind, cut: tuple) -> work.Cost:
        """One micro-batch of one stage, without what data parallelism adds."""
        block = self._blocks(*cut)
        ends = [
            self._ends(name, *cut[:-1]) for name, there in (("embedding", kind.first), ("head", kind.last)) if there
        ]
        return work.added(
            work.times(block.forward, kind.layers), work.times(block.backward, kind.layers), *map(_both_ways, ends)
        )

    def bound(self, pipeline: tuple[str, int, int], micro_batches: int, cut: tuple) -> float:
        """Seconds that a step takes at least, whatever ZeRO's stage: what its stages compute, the least that gradients
        cost there, and the pipeline's bubble."""
        kinds, tensor = self.pipelines.of(*pipeline).kinds, cut[1]
        totals = [self._costs(kind, cut).total + self._converted(kind, tensor) for kind in kinds]
        return self._schedule(pipeline, micro_batches, totals, 0.0).total

    def _convert(self, kind: Kind, tensor: int) -> float:
        """Seconds that gradients of a stage's matrices cost beside their products, at least, for a micro-batch."""
        habits = self.execution
        least = min(habits.gradient_bytes + habits.cast_bytes, habits.narrow + habits.master)
        return self.kernels.passes(least * self._sharing(kind, tensor, 1, 1)[0].elements) * self._slowed

    def _schedule(
        self, pipeline: tuple[str, int, int], micro_batches: int, totals: list[float], message: float
    ) -> Span:
        """Of stages whose kinds take so long."""
        found = self.pipelines.of(*pipeline)
        busiest = max(sum(totals[n] for n in rank) for rank in found.ranks)
        together = sum(map(mul, totals, found.counts))
        stages = Stages(busiest, max(totals), together, pipeline[1] * pipeline[2])
        return span(*pipeline, micro_batches, stages, message)

    def _pass(self, kind: Kind, cut: tuple, sharing: tuple) -> "_Stage":
        """One stage of one micro-batch."""
        block, cost = self._blocks(*cut), self._costs(kind, cut)
        zero, shards, replicas, tensor, pipeline, count = sharing
        held, groups, sent = self._sharing(kind, tensor, shards, replicas)
        if zero == 0:
            each = replicated(held, groups, self.kernels, self.execution, pipeline, block.backward.total)
        else:
            each = sharded(zero, held, groups, sent, self.kernels, self.execution, count, block.forward.total,
                           block.backward.total)  # fmt: skip
        converted = work.Cost((each.forward_pass + each.backward_pass) * self._slowed)
        cost, waits = work.added(cost, converted), each.forward_waits + each.backward_waits
        return _Stage(cost, waits, each.once_waits, each.after, cost.total + waits)

    def _share(self, kind: Kind, tensor: int, shards: int, replicas: int) -> tuple[Held, Groups, Messages]:
        """Matrices of a stage on a tensor rank, the ranks that hold the same, and what they send."""
        block, embedding, head = self.footprint.matrices(tensor)
        other = (embedding if kind.first else 0) + (head if kind.last else 0)
        held = Held(kind.layers, block, other - (self.footprint.tied(tensor) if kind.first and kind.last else 0))
        groups = Groups(
            self._ring(shards, tensor), self._ring(replicas, tensor * shards), self._ring(shards * replicas, tensor)
        )
        return held, groups, messages(held, groups, self.execution)

    def _cut(self, size: int, tensor: int, sequence: bool, context: int, ulysses: bool) -> work.Cut:
        return work.Cut(size, self._ring(tensor, 1), sequence, self._ring(context, tensor), ulysses)

    def _block(self, size: int, tensor: int, sequence: bool, context: int, ulysses: bool, recompute: str) -> work.Both:
        config = with_values(self.config, {"parallel.recompute": recompute})
        cut = self._cut(size, tensor, sequence, context, ulysses)
        return self._slow(work.block(config, cut, self.kernels, self.execution))

    def _end(self, which: str, size: int, tensor: int, sequence: bool, context: int, ulysses: bool) -> work.Both:
        cut = self._cut(size, tensor, sequence, context, ulysses)
        if which == "embedding":
            return self._slow(work.embedding(self.config, cut, self.kernels, self.execution))
        predicted = float(cut.tokens(self.config.data.sequence_length))
        if self.config.model.family == "bert":
            predicted *= self.config.data.mlm_probability
        return self._slow(work.head(self.config, cut, self.kernels, self.execution, predicted))

    def _slow(self, both: work.Both) -> work.Both:
        return work.Both(*(cost._replace(compute=cost.compute * self._slowed) for cost in both))

    @cached_property
    def _slowed(self) -> float:
        """How many times as long ranks compute that share the cores of a host."""
        return max(1.0, min(self.world, self.speeds.ranks_per_host) / self.speeds.at_full_speed)

    def _hidden_seconds(self, layout: Layout, size: int) -> float:
        """Of hidden states on their way to the next stage."""
        if layout.pipeline == 1:
            return 0.0
        tokens = size * self.config.data.sequence_length // layout.context
        elements = tokens * self.config.model.hidden_size // (layout.tensor if layout.sequence else 1)
        return send(self._ring(layout.pipeline, self.world // layout.pipeline), self.execution.residual * elements)

    def _tied(self, layout: Layout, shards: int) -> float:
        """The sum of the two gradients of a weight that first and last stage hold."""
        if layout.pipeline == 1 or SCHEDULES[layout.schedule].placement == "v":
            return 0.0
        ends = self._ring(2, (layout.pipeline - 1) * self.world // layout.pipeline)
        return all_reduce(ends, self.execution.master * self.footprint.tied(layout.tensor) / shards)

    def _optimizer(self, layout: Layout, shards: int) -> float:
        optim, train, wide = self.config.optim, self.config.train, self.execution.master / 4
        fused = optim.name in ("adamw", "adam") and optim.implementation != "foreach"
        each = FUSED_BYTES if fused else FOREACH_BYTES[optim.name]
        each += 4 + (8 if train.clip_grad_norm is not None or self.precision == "fp16" else 0)  # norm, clipping
        pipeline = layout.schedule, layout.pipeline, virtual_of(layout)
        updated = self.footprint.updated(*pipeline, layout.tensor, shards)
        return self.kernels.passes(each * wide * updated) * self._slowed + self._small


class _Stage(NamedTuple):
    """One stage of one micro-batch, forward and backward together."""

    cost: work.Cost
    waits: float
    """For data parallelism's messages."""
    once: float
    """The same once a step."""
    after: float
    """The same after the last micro-batch."""
    seconds: float
    """Of a micro-batch."""


def _both_ways(both: work.Both) -> work.Cost:
    return work.added(both.forward, both.backward)
