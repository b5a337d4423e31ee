"""Compares what the ranks have called: who has not arrived in a collective, and who called another one. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from disttrain.hang.files import Call, RankState

ALIKE = ("all_reduce", "allreduce", "broadcast", "reduce_scatter")
"""Collectives to which every rank of a group hands the same shape."""


@dataclass(frozen=True)
class Wait:
    """A collective that a rank has started and others have not."""

    rank: int
    call: Call
    absent: tuple[int, ...]
    """Members that have not started it; one without a file is among them."""


def waits(states: Mapping[int, RankState]) -> list[Wait]:
    """The first collective of each rank that waits for others, the one that was started first at the beginning."""
    last = _last(states)
    found = [wait for state in states.values() if (wait := _first(state, states, last)) is not None]
    return sorted(found, key=lambda wait: (wait.call.since, wait.rank))


def _first(state: RankState, states: Mapping[int, RankState], last: Mapping[tuple[int, str], int]) -> Wait | None:
    for call in state.calls:
        absent = tuple(
            rank for rank in call.ranks
            if rank not in states or (states[rank].calls and last.get((rank, call.group), 0) < call.sequence)
        )  # fmt: skip
        if not call.completed and absent:
            return Wait(state.rank, call, absent)
    return None


def _last(states: Mapping[int, RankState]) -> dict[tuple[int, str], int]:
    """Number of the newest collective of each rank in each group."""
    last: dict[tuple[int, str], int] = {}
    for rank, state in states.items():
        for call in state.calls:
            last[rank, call.group] = max(call.sequence, last.get((rank, call.group), 0))
    return last


def first_difference(states: Mapping[int, RankState]) -> tuple[tuple[int, Call], tuple[int, Call]] | None:
    """Two ranks that called something else as the same number of the same group; None where all agree.

    Among several the one that was started first. Where all have completed nothing is wrong.
    """
    same: dict[tuple[str, int], list[tuple[int, Call]]] = {}
    for rank, state in sorted(states.items()):
        for call in state.calls:
            same.setdefault((call.group, call.sequence), []).append((rank, call))
    found = [pair for calls in same.values() for pair in _pairs(calls)]
    return min(found, key=lambda pair: min(pair[0][1].since, pair[1][1].since), default=None)


def _pairs(calls: list[tuple[int, Call]]) -> Iterator[tuple[tuple[int, Call], tuple[int, Call]]]:
    if all(call.completed for _, call in calls):
        return
    first = calls[0]
    for other in calls[1:]:
        if _differ(first[1], other[1]):
            yield first, other
            return


def _differ(one: Call, other: Call) -> bool:
    if one.operation != other.operation:
        return True
    return one.operation.startswith(ALIKE) and (one.shapes, one.dtype) != (other.shapes, other.dtype)
