"""Which stages a pipeline's ranks hold, those that are alike taken together: thousands of layouts ask. No torch."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from disttrain.memory import in_flight
from disttrain.stages import stage_numbers, virtual_stages
from disttrain.verify.layouts import Layout


class Kind(NamedTuple):
    """A stage as its cost sees it."""

    layers: int
    first: bool
    """It has the embedding."""
    last: bool
    """It has the head."""


class Composition(NamedTuple):
    """A pipeline."""

    kinds: tuple[Kind, ...]
    """Different ones."""
    counts: tuple[int, ...]
    """Stages of each."""
    ranks: tuple[tuple[int, ...], ...]
    """The kinds that a rank's stages are of, by their place in `kinds`; ranks that differ."""
    of_rank: tuple[int, ...]
    """Which of these each pipeline rank is."""


class Flight(NamedTuple):
    """What a rank holds at most."""

    rank: int
    """Place in `Composition.ranks`."""
    chunks: int
    """Activations of one micro-batch in one stage each."""
    heads: int
    """How many of them are the last stage's."""


def composition(layers: tuple[int, ...], schedule: str, pipeline: int) -> Composition:
    """`layers` of all stages, in order."""
    number = len(layers)
    virtual = number // pipeline
    all_kinds = [Kind(count, at == 0, at == number - 1) for at, count in enumerate(layers)]
    kinds = tuple(dict.fromkeys(all_kinds))
    place = {kind: at for at, kind in enumerate(kinds)}
    held = [
        tuple(place[all_kinds[n]] for n in (stage_numbers(schedule, rank, pipeline, virtual) if pipeline > 1 else [0]))
        for rank in range(pipeline)
    ]
    ranks = tuple(dict.fromkeys(held))
    return Composition(
        kinds, tuple(all_kinds.count(kind) for kind in kinds), ranks, tuple(ranks.index(mine) for mine in held)
    )


def flights(found: Composition, schedule: str, micro_batches: int) -> tuple[Flight, ...]:
    """Of ranks that are alike the one that holds most."""
    pipeline = len(found.of_rank)
    if pipeline == 1:
        return (Flight(0, 1, 1),)
    most: dict[int, tuple[int, int]] = {}
    for rank, kind in enumerate(found.of_rank):
        chunks, heads = in_flight(schedule, rank, pipeline, len(found.ranks[kind]), micro_batches)
        before = most.get(kind, (0, 0))
        most[kind] = max(before[0], chunks), max(before[1], heads)
    return tuple(Flight(kind, *numbers) for kind, numbers in most.items())


class Pipelines(NamedTuple):
    """Compositions and flights of one model, remembered."""

    of: Callable[[str, int, int], Composition]
    """(schedule, pipeline ranks, stages of each)."""
    flights: Callable[[str, int, int, int], tuple[Flight, ...]]
    """The same and micro-batches."""


def pipelines(layers_of: Callable[[int], list[range]]) -> Pipelines:
    """`layers_of(stages)` gives the blocks of every stage."""
    lengths = cache(lambda stages: tuple(map(len, layers_of(stages))))

    @cache
    def of(schedule: str, pipeline: int, virtual: int) -> Composition:
        return composition(lengths(pipeline * virtual), schedule, pipeline)

    @cache
    def held(schedule: str, pipeline: int, virtual: int, micro_batches: int) -> tuple[Flight, ...]:
        return flights(of(schedule, pipeline, virtual), schedule, micro_batches)

    return Pipelines(of, held)


def virtual_of(layout: Layout) -> int:
    """Stages that a rank holds."""
    return virtual_stages(layout.schedule, layout.virtual_stages) if layout.pipeline > 1 else 1
