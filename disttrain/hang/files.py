"""What each rank knows when nothing moves any more: one file a rank in the folder `hang` of the run. Imports no torch."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = "hang"


@dataclass(frozen=True)
class Frame:
    """One line of a Python stack."""

    file: str
    line: int
    function: str
    text: str = ""
    """The source line."""


@dataclass(frozen=True)
class Call:
    """One collective that a rank has started, as torch's flight recorder tells it."""

    group: str
    """Backend and torch's name of the group: the same on all its members."""
    axis: str
    """What the group is for: an axis of the mesh, or default_pg for all ranks."""
    ranks: tuple[int, ...]
    """Ranks of the world that are in the group."""
    sequence: int
    """Number of the collective in its group, from 1."""
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    """Of what is handed in."""
    dtype: str
    completed: bool
    since: float
    """When it was started, seconds since 1970."""


@dataclass(frozen=True)
class RankState:
    """Where one rank is."""

    rank: int
    world_size: int
    host: str
    pid: int
    step: int | None
    """The last step that ended; None before the first one of this process."""
    time: float
    """When this was written, seconds since 1970."""
    timeout_s: float
    stack: tuple[Frame, ...]
    """Of the main thread, innermost frame first."""
    calls: tuple[Call, ...]
    """The newest collectives of every group, in the order in which they were started."""
    error: str | None = None
    """What the rank has failed with; None while it lives."""
    of_peers: bool = False
    """Whether that error comes from waiting for other ranks."""


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank in the folder of a run."""
    return folder / FOLDER / f"rank_{rank:04d}.json"


def write(folder: Path, state: RankState) -> None:
    """Write what a rank knows, at once; makes the folder."""
    path = path_of(folder, state.rank)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(asdict(state), indent=1))
    part.replace(path)


def read(folder: Path) -> dict[int, RankState]:
    """What the ranks of a run have left, by rank; empty where nothing hung."""
    states = (_state(json.loads(path.read_text())) for path in sorted((folder / FOLDER).glob("rank_*.json")))
    return {state.rank: state for state in states}


def _state(read: dict[str, Any]) -> RankState:
    state = RankState(**read)
    calls = tuple(
        Call(**{**call, "ranks": tuple(call["ranks"]), "shapes": tuple(tuple(shape) for shape in call["shapes"])})
        for call in read["calls"]
    )
    return replace(state, stack=tuple(Frame(**frame) for frame in read["stack"]), calls=calls)


@dataclass(frozen=True)
class Log:
    """What the log of a rank tells when the rank itself does not."""

    host: str | None
    last_line: str
    """Empty where the log says no more than that the rank has started."""


STARTED = "started on "
"""Begins the line of a rank's log that names its host."""


def read_log(folder: Path, rank: int) -> Log | None:
    """Host and last line of a rank's log; None where there is none."""
    path = folder / "logs" / f"rank_{rank:04d}.log"
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return None
    hosts = [line.split(STARTED, 1)[1].split(":")[0].split(",")[0] for line in lines if STARTED in line]
    if not lines:
        return None
    return Log(hosts[-1] if hosts else None, "" if STARTED in lines[-1] else lines[-1])
