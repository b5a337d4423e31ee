"""What ranks would call, side by side: the first call on which they do not agree. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf

from disttrain.hang import ledgers
from disttrain.rehearsal.records import Recorded, Trace


@dataclass(frozen=True)
class Mismatch:
    """Calls that should be one and are not, or should have a partner and have none."""

    kinds: tuple[tuple[tuple[int, ...], Recorded], ...]
    """Ranks, and what they call; the first rank's call stands for all of them."""
    absent: tuple[int, ...] = ()
    """Ranks that should call it and call nothing."""
    parted: tuple[tuple[int, Recorded], ...] = ()
    """The first calls before it, of two ranks, that agree but come from different lines."""

    @property
    def place(self) -> float:
        """When it would be reached: place among the calls of a rank."""
        return min(recorded.call.since for _, recorded in self.kinds)


def first_mismatch(traces: Sequence[Trace]) -> Mismatch | None:
    """The first one of the ranks that were rehearsed; None where all agree, and where a rehearsal has failed."""
    found = [*_of_collectives(traces), *_of_messages(traces)]
    return min(found, key=lambda mismatch: mismatch.place, default=None)


def first_deadlock(traces: Sequence[Trace]) -> tuple[tuple[int, Recorded], ...]:
    """Ranks that wait for each other for ever, each with the call it waits in and each for the next one, the last for the
    first; empty where all get through. For traces without a mismatch: what differs is the order of groups.

    A rank waits in collectives that are not asynchronous, until all that were rehearsed have come. Where it waits for
    others and for messages is not recorded, so that a cycle through them is not found.
    """
    called = {trace.rank: [r for r in trace.recorded if r.ends is None] for trace in traces}
    at, came, moved = dict.fromkeys(called, 0), set[tuple[int, str, int]](), True

    def missing(recorded: Recorded) -> list[int]:
        call = recorded.call
        return [rank for rank in call.ranks if rank in called and (rank, call.group, call.sequence) not in came]

    while moved:
        moved = False
        for rank, calls in called.items():
            while at[rank] < len(calls):
                recorded = calls[at[rank]]
                came.add((rank, recorded.call.group, recorded.call.sequence))
                if recorded.waits and missing(recorded):
                    break
                at[rank], moved = at[rank] + 1, True
    waiting = {rank: calls[at[rank]] for rank, calls in called.items() if at[rank] < len(calls)}
    chain = [*waiting][:1]
    while chain and (then := missing(waiting[chain[-1]])[0]) not in chain:
        chain.append(then)
    return tuple((rank, waiting[rank]) for rank in chain[chain.index(then) :]) if chain else ()


def _of_collectives(traces: Sequence[Trace]) -> Iterator[Mismatch]:
    """The first one of every group."""
    recorded = {trace.rank: [r for r in trace.recorded if r.ends is None] for trace in traces}
    by_call = {(rank, r.call.group, r.call.sequence): r for rank, called in recorded.items() for r in called}
    same = ledgers.numbered({rank: [r.call for r in called] for rank, called in recorded.items()})
    seen: set[str] = set()
    lines: dict[str, tuple[tuple[int, Recorded], ...]] = {}
    for (group, sequence), calls in sorted(same.items(), key=lambda item: item[0][1]):
        if group in seen:
            continue
        present = {rank for rank, _ in calls}
        absent = tuple(rank for rank in calls[0][1].ranks if rank in recorded and rank not in present)
        kinds = ledgers.kinds(calls)
        if len(kinds) == 1:  # but one rank's last of a step may be the others' first of the next
            phases = {rank: _order(by_call[rank, group, sequence].phase) for rank in present}
            early = [call for call in calls if phases[call[0]] == min(phases.values())]
            absent += tuple(rank for rank in phases if phases[rank] > min(phases.values()))
            kinds = ledgers.kinds(early)
        if absent or len(kinds) > 1:
            seen.add(group)
            told = tuple((tuple(ranks), by_call[ranks[0], group, sequence]) for ranks, _ in kinds)
            yield Mismatch(tuple(sorted(told, key=lambda kind: -len(kind[0]))), absent, lines.get(group, ()))
        elif group not in lines:
            members = [(rank, by_call[rank, group, sequence]) for rank, _ in calls]
            other = next((member for member in members if member[1].at != members[0][1].at), None)
            if other is not None:
                lines[group] = members[0], other


def _of_messages(traces: Sequence[Trace]) -> Iterator[Mismatch]:
    """The first one of every sender, receiver, group and tag, if both ends were rehearsed."""
    rehearsed = {trace.rank for trace in traces}
    channels: dict[str, tuple[list[Recorded], list[Recorded]]] = {}
    for trace in traces:
        for r in trace.recorded:
            if r.ends is not None and rehearsed >= set(r.ends):
                channels.setdefault(r.call.group, ([], []))[r.ends[1] == trace.rank].append(r)
    for sent, received in channels.values():
        sender, receiver = (sent or received)[0].ends or (0, 0)
        for one, other in zip_longest(sent, received):
            if one and other and one.phase != other.phase:
                one, other = (one, None) if _order(one.phase) < _order(other.phase) else (None, other)
            if one is None or other is None:
                alone, rank, absent = (one, sender, receiver) if one else (other, receiver, sender)
                assert alone is not None
                yield Mismatch((((rank,), alone),), (absent,))
                break
            if (one.call.shapes, one.call.dtype) != (other.call.shapes, other.call.dtype):
                yield Mismatch((((sender,), one), ((receiver,), other)))
                break


def _order(phase: str) -> float:
    """Phases in the order in which ranks go through them."""
    return {"start": -inf, "evaluation": inf}.get(phase) or float(phase.removeprefix("step "))
