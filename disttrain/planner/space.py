"""Which layouts there are, and which of them are legal, without making each of them. No torch.

The rules are those of `disttrain.layout.problems`, which says them to a person and has the last word: whatever is
recommended is given to it, and a test holds both to each other over a whole small space.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from disttrain.config.presets import shape_of
from disttrain.config.schema import ONE_BIT, Config
from disttrain.stages import SCHEDULES, virtual_stages
from disttrain.verify.layouts import Layout

RECOMPUTE = ("none", "selective", "full")


class Axes(NamedTuple):
    """Sizes of the axes that share a model; the rest of the world is data-parallel."""

    tensor: int
    pipeline: int
    context: int

    def data(self, world: int) -> int:
        """Ranks that read different sequences."""
        return world // (self.tensor * self.pipeline * self.context)


class Cut(NamedTuple):
    """What decides a micro-batch's work, beside its size."""

    sequence: bool
    context_method: str
    schedule: str
    virtual: int | None
    """`parallel.virtual_stages`; None where the schedule fixes it."""


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Ascending."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def all_axes(world: int) -> Iterator[Axes]:
    """Every way to share a world, legal or not."""
    for tensor in divisors(world):
        for pipeline in divisors(world // tensor):
            for context in divisors(world // tensor // pipeline):
                yield Axes(tensor, pipeline, context)


def why_not(config: Config, world: int, axes: Axes) -> str | None:
    """The first setting that these sizes do not go with; None where there is none."""
    shape, length = shape_of(config.model), config.data.sequence_length
    if shape.heads % axes.tensor:
        return "model.heads"
    if shape.ffn_hidden_size % axes.tensor:
        return "model.ffn_hidden_size"
    if shape.vocab_size < axes.tensor:
        return "model.vocab_size"
    if axes.pipeline > shape.layers:
        return "model.layers"
    if axes.context > 1 and length % (axes.context * (2 if config.model.family == "gpt" else 1)):
        return "data.sequence_length"
    if config.train.global_batch_size % axes.data(world):
        return "train.global_batch_size"
    return None


def cuts(config: Config, axes: Axes) -> Iterator[Cut]:
    """Those that these axes allow: sequence parallelism or not, every method and schedule, and numbers of stages a rank."""
    shape, length = shape_of(config.model), config.data.sequence_length
    sequences = [False]
    if axes.tensor > 1 and length // axes.context % axes.tensor == 0:
        sequences.append(True)
    methods = ["ring"]
    if axes.context > 1 and shape.heads // axes.tensor % axes.context == 0:
        methods.append("ulysses")
    pipelines: list[tuple[str, int | None]] = [("1f1b", None)]
    if axes.pipeline > 1:
        pipelines = list(_pipelines(axes.pipeline, shape.layers))
    for sequence in sequences:
        for method in methods:
            for schedule, virtual in pipelines:
                yield Cut(sequence, method, schedule, virtual)


def _pipelines(ranks: int, layers: int) -> Iterator[tuple[str, int | None]]:
    """Schedules, with the numbers of stages that share the layers evenly, and with the schedule's own."""
    for schedule, facts in SCHEDULES.items():
        if facts.virtual_stages:
            if facts.virtual_stages * ranks <= layers:
                yield schedule, None
            continue
        most = layers // ranks
        for virtual in range(2, most + 1):
            if virtual == virtual_stages(schedule) or layers % (ranks * virtual) == 0:
                yield schedule, virtual


def micro_batch_sizes(config: Config, world: int, axes: Axes) -> tuple[int, ...]:
    """Sequences of a micro-batch: all that divide a data rank's share of the batch."""
    return divisors(config.train.global_batch_size // axes.data(world))


def schedule_takes(config: Config, axes: Axes, cut: Cut, micro_batches: int, recompute: str) -> bool:
    """Whether the schedule runs with so many micro-batches, and with what is recomputed."""
    ranks = axes.pipeline
    if ranks == 1:
        return True
    least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(cut.schedule, 1)
    rounds = max(1, micro_batches // ranks)
    if micro_batches < least:
        return False
    if cut.schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and micro_batches % rounds:
        return False
    return not (SCHEDULES[cut.schedule].splits_backward and (recompute == "full" or config.run.compile))


def zero_stages(config: Config, world: int, axes: Axes, cut: Cut) -> Iterator[tuple[int, int]]:
    """ZeRO's stages, each with the numbers of replicas of what is sharded; stages that would shard over one rank are left
    out."""
    data = axes.data(world)
    if data * axes.context > 1 or world == 1 or config.compression.codec == "none":
        yield 0, 1
    if config.compression.codec in ONE_BIT:
        return
    for zero in (1, 2, 3):
        if zero == 3 and axes.pipeline > 1 and SCHEDULES[cut.schedule].splits_backward:
            continue
        if data * axes.context == 1:
            continue
        for replicas in divisors(data):
            if data * axes.context // replicas > 1:
                yield zero, replicas


def layout_of(
    config: Config, world: int, axes: Axes, cut: Cut, zero: int, replicas: int, micro_batch: int, recompute: str
) -> Layout:
    """The layout of these choices."""
    return Layout(
        world, axes.tensor, cut.sequence, axes.pipeline, cut.schedule, cut.virtual, axes.context, cut.context_method,
        zero, replicas, False, recompute, micro_batch, config.run.compile,
    )  # fmt: skip


def layouts(config: Config, world: int) -> Iterator[Layout]:
    """Every legal layout that the planner looks at; thousands to millions."""
    for axes in all_axes(world):
        if why_not(config, world, axes):
            continue
        for cut in cuts(config, axes):
            for zero, replicas in zero_stages(config, world, axes, cut):
                for size in micro_batch_sizes(config, world, axes):
                    count = config.train.global_batch_size // axes.data(world) // size
                    for recompute in RECOMPUTE:
                        if schedule_takes(config, axes, cut, count, recompute):
                            yield layout_of(config, world, axes, cut, zero, replicas, size, recompute)
