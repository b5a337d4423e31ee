"""What a rehearsal has found, for a person. Imports no torch."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disttrain.config.schema import Config
from disttrain.hang.explanation import described, handed, names
from disttrain.hang.reading import everyone
from disttrain.loggers.readable import count, size
from disttrain.rehearsal.comparison import Mismatch
from disttrain.rehearsal.records import PARTS, Recorded, Trace

LINES = 3
"""Lines that read a value, of those that are named."""


def agreement(traces: Sequence[Trace], config: Config, world_size: int) -> Group:
    """What a rank calls in a step, by axis; of ranks that call more and less, those that hand over most."""
    step = max((r.phase for trace in traces for r in trace.recorded if r.phase.startswith("step")), default="step 1",
               key=lambda phase: int(phase.split()[1]))  # fmt: skip
    calls: dict[str, Counter[str]] = {}
    given: dict[str, int] = defaultdict(int)
    for trace in traces:
        own: dict[str, list[Recorded]] = defaultdict(list)
        for r in trace.recorded:
            if r.phase == step:
                own[_axis(r, config, world_size)].append(r)
        for axis, recorded in own.items():
            bytes_here = sum(r.handed_bytes for r in recorded)
            if axis not in calls or bytes_here > given[axis]:
                calls[axis], given[axis] = Counter(r.call.operation for r in recorded), bytes_here
    table = Table(box=None, pad_edge=False)
    for column in ("axis", "calls of a step and rank", "handed over"):
        table.add_column(column, justify="right" if column == "handed over" else "left")
    for axis in sorted(calls):
        table.add_row(axis, ", ".join(f"{n} {name}" for name, n in calls[axis].most_common()), f"{count(given[axis])}B")
    total = sum(len(trace.recorded) for trace in traces)
    said = Text(f"rehearsed {_ranks(traces, world_size)}: their {total:,} calls match")
    return Group(said, table, *_guesses(traces))


def held(traces: Sequence[Trace], config: Config) -> Table:
    """The counted peak of one rank of each pipeline rank, by what the bytes hold."""
    counted = [(trace.rank, trace.live) for trace in traces if trace.live is not None]
    parts = [part for part in PARTS if any(live.size(part) for _, live in counted)]
    table = Table(box=None, pad_edge=False, title=f"counted memory of a rank at its peak, {_precision(config)}, on a CPU",
                  title_justify="left", title_style="italic")  # fmt: skip
    for column in ("rank", "together", *parts, "in"):
        table.add_column(column, justify="left" if column == "in" else "right")
    for rank, live in counted:
        where = live.step if live.step == "evaluation" else f"{live.step}: {live.phase}"
        table.add_row(str(rank), f"[bold]{size(live.total)}", *(size(live.size(part)) for part in parts), where)
    return table


def _precision(config: Config) -> str:
    return "bf16" if config.precision == "auto" else config.precision


def disagreement(mismatch: Mismatch, traces: Sequence[Trace], config: Config, world_size: int) -> str:
    """The paragraph on the first mismatch."""
    group = everyone(config.parallel, world_size)
    parts = [f"{names(ranks)} {'call' if len(ranks) > 1 else 'calls'} {_told(r, group)}" for ranks, r in mismatch.kinds]
    if mismatch.absent:
        parts.append(f"{names(mismatch.absent)} {_do(mismatch.absent)} not")
    everybody = sorted({rank for ranks, _ in mismatch.kinds for rank in ranks} | set(mismatch.absent))
    text = f"{names(everybody).capitalize()} do not match in {mismatch.kinds[0][1].phase}: {'; '.join(parts)}."
    if mismatch.parted:
        (one, first), (other, second) = mismatch.parted
        text += (
            f" They part before it: {first.call.operation} number {first.call.sequence} of this group is called by rank "
            f"{one} at {first.at}, and by rank {other} at {second.at}."
        )
    return f"{text} (Rehearsed {_ranks(traces, world_size)}.)"


def deadlock(waiting: Sequence[tuple[int, Recorded]], traces: Sequence[Trace], config: Config, world_size: int) -> str:
    """The paragraph on ranks that wait for each other."""
    group = everyone(config.parallel, world_size)
    ranks = [rank for rank, _ in waiting]
    parts = [
        f"rank {rank} waits in {_told(recorded, group)}, for rank {other}"
        for (rank, recorded), other in zip(waiting, [*ranks[1:], ranks[0]], strict=True)
    ]
    return (
        f"{names(sorted(ranks)).capitalize()} would wait for each other for ever in {waiting[0][1].phase}: "
        f"{'; '.join(parts)}. They call the same, in another order. (Rehearsed {_ranks(traces, world_size)}.)"
    )


def failure(trace: Trace) -> str:
    """Why a rank could not be rehearsed."""
    return f"Rank {trace.rank} fails at {trace.at}: {trace.error}"


def _told(recorded: Recorded, group: str) -> str:
    """A call with its line."""
    call = recorded.call
    if recorded.ends is None:
        return f"{described(call, group)}, at {recorded.at}"
    axis = group if call.axis == "default_pg" else call.axis
    to = f"to rank {recorded.ends[1]}" if call.operation == "send" else f"from rank {recorded.ends[0]}"
    return f"{call.operation} number {call.sequence} {to} in group {axis}, {handed(call)}, at {recorded.at}"


def _do(ranks: Sequence[int]) -> str:
    return "do" if len(ranks) > 1 else "does"


def _axis(recorded: Recorded, config: Config, world_size: int) -> str:
    axis = recorded.call.axis
    return everyone(config.parallel, world_size) if axis == "default_pg" else axis


def _ranks(traces: Sequence[Trace], world_size: int) -> str:
    return f"{len(traces)} of {world_size} ranks"


def _guesses(traces: Sequence[Trace]) -> list[Text]:
    """What was decided without knowing a value."""
    lines = sorted({line for trace in traces for line in trace.guessed})
    if not lines:
        return []
    more = f" and {len(lines) - LINES} more" if len(lines) > LINES else ""
    return [Text(f"values are read, and were taken to be 1 or true, at {'; '.join(lines[:LINES])}{more}")]
