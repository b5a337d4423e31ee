"""Compares what the ranks have called: who has not arrived in a collective, and who called another one. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from disttrain.hang.files import Call, RankState

ALIKE = ("all_reduce", "allreduce", "broadcast", "reduce_scatter", "all_gather_into_tensor")
"""Collectives to which every rank of a group hands the same shape."""
BESIDE = ("checkpoint", "beside the step")
"""Ends of the names of groups over which a thread beside the step talks."""


@dataclass(frozen=True)
class Wait:
    """A collective that a rank has started and others have not."""

    rank: int
    call: Call
    absent: tuple[int, ...]
    """Members that have not started it; one without a file is among them."""


def waits(states: Mapping[int, RankState]) -> list[Wait]:
    """The first collective of each rank that waits for others, the one that was started first at the beginning; one of a
    thread beside the step only where the step waits in none."""
    last = _last(states)
    found = [wait for state in states.values() if (wait := _first(state, states, last)) is not None]
    return sorted(found, key=lambda wait: (_beside(wait.call), wait.call.since, wait.rank))


def _beside(call: Call) -> bool:
    return call.axis.endswith(BESIDE)


def _first(state: RankState, states: Mapping[int, RankState], last: Mapping[tuple[int, str], int]) -> Wait | None:
    for call in sorted(state.calls, key=_beside):
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


def first_difference(states: Mapping[int, RankState]) -> list[tuple[list[int], Call]]:
    """The ranks that called something else as the same number of the same group, by what they called, most ranks first;
    empty where all agree.

    Of several numbers the one that was started first. Where all have completed nothing is wrong.
    """
    same = numbered({rank: state.calls for rank, state in states.items()})
    unfinished = [calls for calls in same.values() if not all(call.completed for _, call in calls)]
    found = [parted for calls in unfinished if len(parted := kinds(calls)) > 1]
    first = min(found, key=lambda parted: min(call.since for _, call in parted), default=[])
    return sorted(first, key=lambda kind: -len(kind[0]))


def numbered(calls: Mapping[int, Iterable[Call]]) -> dict[tuple[str, int], list[tuple[int, Call]]]:
    """The calls of all ranks, by group and number in it; each with its rank, in order of these."""
    same: dict[tuple[str, int], list[tuple[int, Call]]] = {}
    for rank, called in sorted(calls.items()):
        for call in called:
            same.setdefault((call.group, call.sequence), []).append((rank, call))
    return same


def kinds(calls: list[tuple[int, Call]]) -> list[tuple[list[int], Call]]:
    """Calls that should be the same one, as ranks and what they called: one kind where they agree."""
    found: list[tuple[list[int], Call]] = []
    for rank, call in calls:
        ranks = next((ranks for ranks, known in found if not _differ(known, call)), None)
        if ranks is None:
            found.append(([rank], call))
        else:
            ranks.append(rank)
    return found


def _differ(one: Call, other: Call) -> bool:
    if one.operation != other.operation:
        return True
    return one.operation.startswith(ALIKE) and (one.shapes, one.dtype) != (other.shapes, other.dtype)
