"""Why a run hangs, in one paragraph, from the files of its ranks. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from disttrain.hang import ledgers, stacks
from disttrain.hang.files import Call, Log, RankState
from disttrain.hang.ledgers import Wait

RESUMES = "The same command goes on from the newest checkpoint."


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run that hangs, or has failed."""

    states: Mapping[int, RankState]
    """What the ranks have left; at least one."""
    logs: Mapping[int, Log]
    """Of the ranks that have left nothing."""
    everyone: str = "world"
    """Name of the group of all ranks."""

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have left nothing."""
        world_size = next(iter(self.states.values())).world_size
        return tuple(rank for rank in range(world_size) if rank not in self.states)

    def call(self, call: Call) -> str:
        """A collective for a person."""
        return described(call, self.everyone)

    def named(self, rank: int) -> str:
        """A rank with its host and process, as far as known."""
        if rank in self.states:
            return f"rank {rank} (host {self.states[rank].host}, process {self.states[rank].pid})"
        log = self.logs.get(rank)
        return f"rank {rank} (host {log.host})" if log and log.host else f"rank {rank}"


def explain(evidence: Evidence) -> str:
    """The paragraph: who did not arrive, where the others wait, and the likely cause."""
    states = evidence.states
    failed = [state for state in states.values() if state.error is not None and not state.of_peers]
    waits = ledgers.waits(states)
    if failed:
        return _failure(min(failed, key=lambda state: state.time), waits, evidence)
    if kinds := ledgers.first_difference(states):
        return _difference(kinds, evidence)
    blocked = {rank for rank, state in states.items() if is_blocked(state, waits)}
    culprits = evidence.missing or tuple(rank for rank in sorted(states) if rank not in blocked)
    if culprits:
        return _absence(culprits, waits, evidence)
    return _circle(waits, evidence)


def is_blocked(state: RankState, waits: Sequence[Wait]) -> bool:
    """Whether a rank can do nothing but wait for others."""
    mine = next((wait for wait in waits if wait.rank == state.rank), None)
    asynchronous = mine is not None and (mine.call.group.startswith("nccl") or stacks.computes_backward(state.stack))
    return state.of_peers or stacks.waits(state.stack) or asynchronous


def described(call: Call, everyone: str) -> str:
    """A collective for a person: operation, number, group and shape. `everyone` is the name of the group of all ranks."""
    axis = everyone if call.axis == "default_pg" else call.axis
    what = handed(call)
    return f"{call.operation} number {call.sequence} of group {axis} ({names(call.ranks)})" + (what and f", {what}")


def handed(call: Call) -> str:
    """Type and shapes of what is handed in; nothing of a barrier."""
    shapes = ", ".join(str(list(shape)) for shape in call.shapes[:3])
    more = f" and {len(call.shapes) - 3} more" if len(call.shapes) > 3 else ""
    return f"{call.dtype.lower()} {shapes}{more}" if shapes else ""


def names(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0 to 7", "ranks 1, 4"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    listed = ", ".join(str(rank) for rank in ranks[:16])
    return f"ranks {listed}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _absence(culprits: Sequence[int], waits: Sequence[Wait], evidence: Evidence) -> str:
    """Some ranks are not where the others wait for them."""
    subject = ", ".join(evidence.named(rank) for rank in culprits[:4])
    if len(culprits) > 4:
        subject += f" and {len(culprits) - 4} more"
    wait = next((wait for wait in waits if set(wait.absent) <= set(culprits)), None)
    wait = wait or next((wait for wait in waits if set(wait.absent) & set(culprits)), None)
    sentences = [f"{subject[0].upper()}{subject[1:]} did not arrive. {_waiting(wait, waits, evidence)}"]
    if wait is not None and (others := sorted({other.rank for other in waits} - {wait.rank} - set(culprits))):
        others = [rank for rank in others if not _same_call(rank, wait, waits)]
        if others:
            sentences.append(f"{names(others).capitalize()} {_have(others)} to wait in turn.")
    if culprits[0] in evidence.states:
        state = evidence.states[culprits[0]]
        words, why = stacks.doing(state.stack)
        sentences.append(
            f"Likely cause: rank {state.rank} is {words}, at {stacks.place(state.stack)}, {_step(state)}; {why}."
        )
    else:
        sentences.append(_silence(culprits, evidence))
    return " ".join(sentences)


def _same_call(rank: int, wait: Wait, waits: Sequence[Wait]) -> bool:
    return any(
        w.rank == rank and (w.call.group, w.call.sequence) == (wait.call.group, wait.call.sequence) for w in waits
    )


def _waiting(wait: Wait | None, waits: Sequence[Wait], evidence: Evidence) -> str:
    """Where the others wait."""
    if wait is None:
        stuck = [state for state in evidence.states.values() if stacks.waits(state.stack) or state.of_peers]
        if not stuck:
            return "No rank waits in a collective."
        state = stuck[0]
        return (
            f"Rank {state.rank} waits at {stacks.place(state.stack)}, {_step(state)}, for what another rank would send."
        )
    together = sorted({w.rank for w in waits if _same_call(w.rank, wait, waits)})
    since = datetime.fromtimestamp(wait.call.since).strftime("%H:%M:%S")
    state = evidence.states[wait.rank]
    return (
        f"{names(together).capitalize()} {_have(together)} waited for {names(wait.absent)} since {since} in "
        f"{evidence.call(wait.call)}, at {stacks.place(state.stack)}, {_step(state)}."
    )


def _silence(culprits: Sequence[int], evidence: Evidence) -> str:
    """Ranks that left no file: what became of them."""
    rank = culprits[0]
    closed = any(state.error and "imed out" not in state.error for state in evidence.states.values())
    state = ("has ended (killed, out of memory, crashed) or its host is cut off" if closed else
             "is stopped, its host is down or cut off, or it is inside native code that never returns")  # fmt: skip
    log = evidence.logs.get(rank)
    told = f", and the last line of logs/rank_{rank:04d}.log is: {log.last_line}" if log and log.last_line else ""
    return f"Likely cause: rank {rank} left no word when the others did: its process {state}{told}. {RESUMES}"


def _failure(state: RankState, waits: Sequence[Wait], evidence: Evidence) -> str:
    wait = next((wait for wait in waits if state.rank in wait.absent), None)
    waiting = _waiting(wait, waits, evidence) if wait is not None else "The others lost it."
    named = evidence.named(state.rank)
    return (
        f"{named[0].upper()}{named[1:]} failed at {stacks.place(state.stack)}, {_step(state)}: {state.error}. {waiting} "
        f"Likely cause: that failure; logs/rank_{state.rank:04d}.log has its traceback. {RESUMES}"
    )


def _difference(kinds: Sequence[tuple[list[int], Call]], evidence: Evidence) -> str:
    """Ranks that called something else as the same number of a group."""
    parts = [
        f"{names(ranks)} {'are' if len(ranks) > 1 else 'is'} in {evidence.call(call)}, at "
        f"{stacks.place(evidence.states[ranks[0]].stack)}"
        for ranks, call in kinds[:3]
    ]
    everyone = sorted(rank for ranks, _ in kinds for rank in ranks)
    same = len({call.operation for _, call in kinds}) == 1
    cause = ("the ranks hand over other shapes, as when a batch, a mask or a model's size depends on the rank" if same else
             "the code took different branches on different ranks")  # fmt: skip
    return (
        f"{names(everyone).capitalize()} do not call the same: {'; '.join(parts)}; {_step(evidence.states[everyone[0]])}. "
        f"Likely cause: {cause}."
    )


def _circle(waits: Sequence[Wait], evidence: Evidence) -> str:
    """Every rank waits."""
    by_rank = {wait.rank: wait for wait in waits}
    circle = _find_circle(by_rank)
    if circle:
        parts = [
            f"rank {rank} waits for {names(by_rank[rank].absent)} in {evidence.call(by_rank[rank].call)}, at "
            f"{stacks.place(evidence.states[rank].stack)}"
            for rank in circle[:3]
        ]
        return (
            f"{names(circle).capitalize()} wait for each other: {'; '.join(parts)}; {_step(evidence.states[circle[0]])}. "
            "Likely cause: the code took different branches on different ranks, so that they meet in different groups."
        )
    state = evidence.states[min(evidence.states)]
    if waits:
        return (
            f"{_waiting(waits[0], waits, evidence)} Likely cause: not known; logs/ and hang/ have what the ranks saw."
        )
    open_calls = [call for call in state.calls if not call.completed]
    where = f"in {evidence.call(open_calls[0])}" if open_calls else "for what another rank would send"
    return (
        f"All ranks arrived and nothing completes: rank {state.rank} waits {where}, at {stacks.place(state.stack)}, "
        f"{_step(state)}. Likely cause: the network between the hosts does not carry the data (a firewall, a wrong "
        "interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, a broken link); `disttrain doctor` measures it."
    )


def _find_circle(by_rank: Mapping[int, Wait]) -> list[int]:
    """Ranks of which each waits for the next one and the last for the first; empty where there is no such circle."""
    for start in by_rank:
        path = [start]
        while (at := by_rank[path[-1]].absent[0]) in by_rank:
            if at in path:
                return sorted(path[path.index(at) :])
            path.append(at)
    return []


def _have(ranks: Sequence[int]) -> str:
    return "have" if len(ranks) > 1 else "has"


def _step(state: RankState) -> str:
    return "before its first step ended" if state.step is None else f"after step {state.step}"
