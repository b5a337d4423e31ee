"""The seconds of all ranks in one file and one table. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from disttrain.loggers import readable
from disttrain.profiling.seconds import AXES, COMPUTING, ROWS

FOLDER, FILE = "trace", "step_seconds.json"

LABELS = {"other": "other operators", "loading": "loading data",
          "exposed pipeline": "exposed: pipeline (and bubble)"}  # fmt: skip


@dataclass(frozen=True)
class RankSeconds:
    """What one rank's steps were made of; means over the steps, in seconds."""

    rank: int
    host: str
    step_seconds: float
    rows: Mapping[str, float]
    """By `seconds.ROWS`; they add up to step_seconds."""
    on_the_way: Mapping[str, float | None]
    """By axis, hidden or not; None where it is not seen."""
    memory: Mapping[str, Any] | None = None
    """The moment of the step with the most live bytes, see `memory.Timeline.at_peak`; None on a rank without a picture."""

    @property
    def own_seconds(self) -> float:
        """What the rank does by itself: computing and data."""
        return sum(self.rows[row] for row in (*COMPUTING, "loading"))


def summarised(steps: Sequence[int], device: str, ranks: Sequence[RankSeconds], asked: Sequence[int]) -> dict[str, Any]:
    """What `step_seconds.json` holds. `asked` are the first and last step that should have been looked at."""
    worst = max(ranks, key=lambda rank: (rank.own_seconds, -rank.rank))
    mean = {row: sum(rank.rows[row] for rank in ranks) / len(ranks) for row in ROWS}
    ways = {axis: [rank.on_the_way[axis] for rank in ranks] for axis in AXES}
    return {
        "steps": list(steps),
        "complete": len(steps) == asked[1] - asked[0] + 1,
        "device": device,
        "step_seconds_mean": sum(rank.step_seconds for rank in ranks) / len(ranks),
        "seconds_mean": mean,
        "on_the_way_seconds_mean": {axis: _mean(values) for axis, values in ways.items()},
        "worst_rank": worst.rank,
        "ranks": [asdict(rank) for rank in ranks],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def read(folder: Path) -> dict[str, Any] | None:
    """The file of a run folder; None where there is no profile, or none that can be read."""
    try:
        return json.loads((folder / FOLDER / FILE).read_text())
    except (OSError, ValueError):
        return None


def table(found: Mapping[str, Any], usual_seconds: float | None = None) -> Table:
    """Seconds of a step by kind, mean of the ranks and of the one with the most work of its own. `usual_seconds` is the
    median of a step that was not looked at."""
    worst = next(rank for rank in found["ranks"] if rank["rank"] == found["worst_rank"])
    first, last = found["steps"][0], found["steps"][-1]
    beside = f", {readable.step_time(usual_seconds)} without a profile" if usual_seconds else ""
    shown = Table(title=f"a step by kind, steps {first} to {last}{beside}", title_style="bold", title_justify="left")
    shown.add_column("kind", no_wrap=True)
    shown.add_column("mean", justify="right")
    shown.add_column("share", justify="right")
    shown.add_column(f"rank {worst['rank']}, most work", justify="right")
    shown.add_column("on the way, mean", justify="right")
    whole = found["step_seconds_mean"]
    for row in ROWS:
        axis = row.removeprefix("exposed ")
        way = found["on_the_way_seconds_mean"].get(axis) if row.startswith("exposed ") else None
        unseen = row.startswith("exposed ") and axis in found["on_the_way_seconds_mean"] and way is None
        if not (found["seconds_mean"][row] or worst["rows"][row] or way or unseen):
            continue
        label = LABELS.get(row, f"exposed: {axis}" if row.startswith("exposed ") else row)
        mean, own = found["seconds_mean"][row], worst["rows"][row]
        shown.add_row(label, readable.step_time(mean), readable.percent(mean / whole), readable.step_time(own),
                      "not seen" if unseen else readable.step_time(way) if way else "")  # fmt: skip
    shown.add_section()
    shown.add_row("step", readable.step_time(whole), "", readable.step_time(worst["step_seconds"]), "")
    return shown
