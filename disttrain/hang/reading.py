"""Evidence from the folder of a run, and `disttrain explain`, which shows it. Imports no torch."""

import fcntl
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disttrain.config.problems import Problem, RefusedInput
from disttrain.hang import files, ledgers, stacks
from disttrain.hang.explanation import Evidence, explain, is_blocked

if TYPE_CHECKING:
    from disttrain.config.schema import ParallelConfig

ANSWER_S = 4.0
"""How long the ranks of a run that goes on have to say where they are; they look once a second."""


def evidence_of(folder: Path) -> Evidence:
    """What the ranks of a run have left. Raises RefusedInput where they have left nothing."""
    states = files.read(folder)
    if not states:
        raise RefusedInput([Problem((f"run {folder}",), "there is nothing to explain: no rank of it has waited in vain",
                                    "give the folder of a run that hangs, or that failed waiting")])  # fmt: skip
    evidence = Evidence(states, {}, _everyone(folder, next(iter(states.values())).world_size))
    logs = {rank: log for rank in evidence.missing if (log := files.read_log(folder, rank)) is not None}
    return Evidence(states, logs, evidence.everyone)


def _goes_on(folder: Path) -> bool:
    """Whether a process holds the run folder."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _ask(folder: Path) -> None:
    """Let the ranks of a run that goes on say where they are, as far as they have not moved for a second."""
    made = folder / files.FOLDER
    made.mkdir(exist_ok=True)
    deadline, found = time.monotonic() + ANSWER_S, files.read(folder)
    while time.monotonic() < deadline and (not found or len(found) < next(iter(found.values())).world_size):
        time.sleep(0.1)
        found = files.read(folder)
    if not found:
        with suppress(OSError):
            made.rmdir()
        raise RefusedInput([Problem((f"run {folder}",), "there is nothing to explain: its ranks move",
                                    "ask again when none has for some seconds")])  # fmt: skip


def _everyone(folder: Path, world_size: int) -> str:
    """Name of the group of all ranks of a run."""
    import yaml

    from disttrain.config.schema import ParallelConfig

    try:
        parallel = ParallelConfig(**yaml.safe_load((folder / "config.yaml").read_text())["parallel"])
        return everyone(parallel, world_size)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return "world"


def everyone(parallel: "ParallelConfig", world_size: int) -> str:
    """Name of the group of all ranks: that of the only axis they differ on, where it is only one."""
    from disttrain.mesh import AXES, build_mesh

    mesh = build_mesh(parallel, world_size)
    axes = [axis for axis, size in zip(AXES, mesh.sizes, strict=True) if size > 1]
    return {"replicate": "data", "shard": "data"}.get(axes[0], axes[0]) if len(axes) == 1 else "world"


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/gpt_tiny.")],
) -> None:
    """Say why a run hangs, or hung: who did not arrive, where the others wait, and the likely cause."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not files.read(run) and _goes_on(run):
        _ask(run)
    evidence = evidence_of(run)
    console = Console()
    console.print(explain(evidence), markup=False, highlight=False)
    table = Table("rank", "host", "after step", "in", "at")
    waits = ledgers.waits(evidence.states)
    for rank in range(next(iter(evidence.states.values())).world_size):
        state = evidence.states.get(rank)
        if state is None:
            log = evidence.logs.get(rank)
            table.add_row(str(rank), (log and log.host) or "?", "?", "no word from it", "?")
            continue
        call = next((wait.call for wait in waits if wait.rank == rank), None)
        call = call or next((call for call in state.calls if not call.completed), None)
        where = (
            evidence.call(call) if call and is_blocked(state, waits) else state.error or stacks.doing(state.stack)[0]
        )
        step = "-" if state.step is None else str(state.step)
        table.add_row(str(rank), state.host, step, escape(where), escape(stacks.place(state.stack)))
    console.print(table)
