"""The terminal while a comparison runs: a line for every run that has ended, below them the one that goes on. No torch."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from disttrain.compare import outcomes
from disttrain.compare.outcomes import Outcome
from disttrain.compare.plan import Plan, Task
from disttrain.loggers import readable
from disttrain.loggers.jsonl import FILE

TAIL_BYTES = 8192
"""As much of the end of metrics.jsonl is read to see how far a run is."""


class Terminal:
    """Shows a comparison that runs; a context manager. Off a terminal it prints lines only."""

    def __init__(self, plan: Plan, tasks: Sequence[Task], console: Console):
        self._plan, self._tasks, self._console = plan, tasks, console
        self._began = self._run_began = time.monotonic()
        self._seconds: dict[str, list[float]] = {}
        """Seconds of the runs of each strategy that have ended."""
        self._left = [task for task in tasks if not plan.strategy(task.strategy).refused]
        self._total = len(self._left)
        self._width = max(len(task.name) for task in tasks)
        self._running: tuple[Task, Path] | None = None
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        for task in self._left:
            if (earlier := outcomes.read(plan.folder, task)) and earlier.state == "done":
                self._seconds.setdefault(task.strategy, []).append(earlier.seconds)

    def __enter__(self) -> Self:
        for name in dict.fromkeys(task.strategy for task in self._tasks):
            for problem in self._plan.strategy(name).refused:
                self._console.print(Text(f"{name} is left out: {problem.message} ({problem.fix})", style="red"))
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def started(self, task: Task, run_folder: Path) -> None:
        """A run begins."""
        self._running, self._run_began = (task, run_folder), time.monotonic()
        self.look()

    def look(self) -> None:
        """Show how far it is."""
        if self._live and self._running:
            self._live.update(self._state(*self._running), refresh=True)

    def ended(self, outcome: Outcome) -> None:
        """A run has ended."""
        task, folder = Task(outcome.strategy, outcome.repeat), self._plan.folder / "runs"
        self._drop(task)
        if outcome.state == "done":
            self._seconds.setdefault(outcome.strategy, []).append(outcome.seconds)
            text = Text.assemble(*_figures(folder / task.name), (f"  took {readable.duration(outcome.seconds)}", "dim"))
        else:
            text = Text(f"{outcome.state}: {outcome.reason}", style="red")
        self._line(task, text)

    def skipped(self, task: Task, why: str) -> None:
        """A run is left out."""
        self._drop(task)
        self._line(task, Text(why, style="dim"))

    def _drop(self, task: Task) -> None:
        self._left, self._running = [t for t in self._left if t != task], None

    def _line(self, task: Task, text: Text) -> None:
        number = self._total - len(self._left)
        head = f"{number:>{len(str(self._total))}}/{self._total}  {task.name:<{self._width}}  "
        self._console.print(Text.assemble((head, "bold"), text), soft_wrap=self._live is None)

    def _state(self, task: Task, run_folder: Path) -> Group:
        """The run that goes on, and the whole."""
        steps = self._plan.strategy(task.strategy).config["train"].get("steps")
        last = _last_step(run_folder / FILE)
        parts = ["starting"]
        if last:
            parts = [f"step {last['step']}" + (f"/{steps}" if steps else ""), f"loss {readable.loss(last['loss'])}",
                     f"{readable.count(last['tokens_per_second'])} tokens/s"]  # fmt: skip
        doing = Text.assemble((task.name, "bold cyan"), f"  repeat {task.repeat} of {self._plan.repeats}  ",
                              "  ".join(parts))  # fmt: skip
        done = self._total - len(self._left)
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=self._total, completed=done, width=30), f"{done} of {self._total} runs",
                    Text(self._times(), style="dim"))  # fmt: skip
        return Group(doing, row)

    def _times(self) -> str:
        since = readable.duration(time.monotonic() - self._began)
        left = self.seconds_left(time.monotonic() - self._run_began)
        return f"{since} so far" + ("" if left is None else f", about {readable.duration(left)} left")

    def seconds_left(self, running_s: float) -> float | None:
        """Time until all is done: each run as long as those of its strategy before, else as all before; None at first."""
        known = [s for each in self._seconds.values() for s in each]
        if not known:
            return None
        expected = [
            sum(own) / len(own) if (own := self._seconds.get(task.strategy)) else sum(known) / len(known)
            for task in self._left
        ]
        return max(0.0, expected[0] - running_s) + sum(expected[1:]) if expected else 0.0


def _figures(run_folder: Path) -> list[str]:
    summary = json.loads((run_folder / "summary.json").read_text())
    memory = summary.get("peak_reserved_bytes_max") or summary.get("host_rss_bytes_max")
    return [f"{readable.count(summary.get('tokens_per_second_mean')):>6} tokens/s  ",
            f"loss {readable.loss(summary.get('loss'))}  {readable.size(memory):>8}"]  # fmt: skip


def _last_step(path: Path) -> dict[str, Any] | None:
    """The newest step record of a run that goes on, or none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "step":
            return record
    return None
