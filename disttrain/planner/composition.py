"""Which stages a pipeline's ranks hold, those that are alike taken together: thousands of layouts ask. No torch."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

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


class Pipelines(NamedTuple):
    """Compositions of one model, remembered."""

    of: Callable[[str, int, int], Composition]
    """(schedule, pipeline ranks, stages of each)."""


def pipelines(layers_of: Callable[[int], list[range]]) -> Pipelines:
    """`layers_of(stages)` gives the blocks of every stage."""
    lengths = cache(lambda stages: tuple(map(len, layers_of(stages))))

    @cache
    def of(schedule: str, pipeline: int, virtual: int) -> Composition:
        return composition(lengths(pipeline * virtual), schedule, pipeline)

    return Pipelines(of)


def virtual_of(layout: Layout) -> int:
    """Stages that a rank holds."""
    return virtual_stages(layout.schedule, layout.virtual_stages) if layout.pipeline > 1 else 1
