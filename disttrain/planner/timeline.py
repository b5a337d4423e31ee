"""Seconds of a pipeline's schedule, from the seconds of its stages. No torch.

Letters: P pipeline ranks, v stages a rank holds, M micro-batches; s seconds that a stage takes for a micro-batch, there and
back; d seconds that hidden states travel from one stage to the next.
"""

from functools import cache
from typing import NamedTuple

from disttrain.memory import in_flight
from disttrain.stages import theoretical_bubble


class Span(NamedTuple):
    """Seconds of all micro-batches on the rank that computes longest."""

    busy: float
    """M times the sum of its stages."""
    waits: float
    """For messages between stages, while the pipeline is full and while it fills and empties."""
    bubble: float
    """For other stages."""

    @property
    def total(self) -> float:
        """From the first action to the last."""
        return self.busy + self.waits + self.bubble


class Stages(NamedTuple):
    """Seconds that the stages of a pipeline take for a micro-batch, forward and backward together."""

    busiest: float
    """Those of the rank with the most, together."""
    longest: float
    """One of them."""
    together: float
    """All of them."""
    number: int


def span(schedule: str, ranks: int, virtual: int, micro_batches: int, stages: Stages, message: float) -> Span:
    """Of a pipeline.

    The slowest rank is busy all the time once the pipeline is full, and idle while it fills and empties: as many
    stages' time as `disttrain.stages.theoretical_bubble` leaves idle, each of their average length. For 1F1B that is
    the exact sum of all stages and M - 1 times the slowest one.

    Messages are waited for where too few micro-batches are in flight to hide them: with k of the v P stages' activations on
    the first rank, a micro-batch is back after sum(s) + 2 (v P - 1) d, so that none can begin more often than every v / k of
    that. 1F1B, where k = P, waits for about 2 d a micro-batch; while the pipeline fills and empties, 2 (P - 1) d.
    """
    busy = micro_batches * stages.busiest
    if ranks == 1:
        return Span(busy, 0.0, 0.0)
    others = (stages.together - stages.longest) / (stages.number - 1)
    bubble = _idle_stages(schedule, ranks, virtual, micro_batches) * others
    if not message:
        return Span(busy, 0.0, bubble)
    kept, _ = in_flight(schedule, 0, ranks, virtual, micro_batches)
    there_and_back = stages.together + 2 * (virtual * ranks - 1) * message
    late = max(0.0, virtual * there_and_back / kept - stages.busiest)
    return Span(busy, (micro_batches - 1) * late + 2 * (ranks - 1) * message, bubble)


@cache
def _idle_stages(schedule: str, ranks: int, virtual: int, micro_batches: int) -> float:
    """Time that a rank is idle, in times of one stage there and back."""
    bubble = theoretical_bubble(schedule, ranks, virtual, micro_batches)
    return virtual * micro_batches * bubble / (1 - bubble)
