"""The seconds of a step by kind. Every moment has one kind, so that the kinds add up to the step; pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from disttrain.profiling.intervals import Intervals, common, seconds, union, without

COMPUTING = ("forward", "backward", "optimizer", "other")
"""Kinds of computing. optimizer: from the end of the last backward pass to the end of the engine's step (norm, clipping,
update). other: operators outside these."""
AXES = ("tensor", "sequence", "context", "pipeline", "data", "world")
"""Where messages of several axes are on their way while nothing is computed, the first of these is waited for."""
ROWS = (*COMPUTING, *(f"exposed {axis}" for axis in AXES), "loading", "idle")
"""Kinds that add up to a step."""


@dataclass(frozen=True)
class Activity:
    """What one rank did in one step: moments on any clock, in seconds."""

    start: float
    end: float
    computing: Mapping[str, Intervals]
    """By kind of computing; a moment of two kinds is of the first."""
    travelling: Mapping[str, Intervals]
    """By axis: when a collective or a message was on its way."""
    loading: Intervals = field(default_factory=list)
    """When the loop waited for a batch, or made tensors of it."""


def step_rows(did: Activity) -> dict[str, float]:
    """Seconds of each of `ROWS`, which add up to the step's."""
    left: Intervals = [(did.start, did.end)]
    rows: dict[str, float] = {}

    def take(row: str, moments: Intervals) -> None:
        nonlocal left
        rows[row] = seconds(common(left, moments))
        left = without(left, moments)

    for kind in COMPUTING:
        take(kind, did.computing.get(kind, []))
    for axis in AXES:
        take(f"exposed {axis}", did.travelling.get(axis, []))
    take("loading", did.loading)
    rows["idle"] = seconds(left)
    return rows


def on_the_way(did: Activity) -> dict[str, float]:
    """Seconds by axis in which something was on its way, hidden behind computing or not."""
    step = [(did.start, did.end)]
    return {axis: seconds(common(step, union(did.travelling.get(axis, [])))) for axis in AXES}
