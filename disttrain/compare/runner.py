"""Runs what a comparison has not done yet, in interleaved order; a run that fails does not stop the others. No torch."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from disttrain.compare import launching, outcomes
from disttrain.compare.outcomes import Outcome
from disttrain.compare.plan import Plan, Planned, Task
from disttrain.interruption import Interruption

COLUMNS = "400"
"""Width of what runs print, so that a reason stays one line in their logs."""


class Display(Protocol):
    """What is shown of it."""

    def started(self, task: Task, run_folder: Path) -> None:
        """A run begins."""
        ...

    def look(self) -> None:
        """A run goes on."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """A run has ended."""
        ...

    def skipped(self, task: Task, why: str) -> None:
        """A run is left out: done before, or of a strategy that has just failed."""
        ...


def run_all(plan: Plan, tasks: Sequence[Task], display: Display, interruption: Interruption) -> bool:
    """Do every task that is not done; whether all of them came to an end, however they ended.

    The other repeats of a strategy that fails are left for the next call: what fails mostly fails again, and a
    time-out of an hour need not be waited for three times.
    """
    failed: set[str] = set()
    for task in tasks:
        planned = plan.strategy(task.strategy)
        if planned.refused:
            continue
        if interruption.requested:
            return False
        if outcomes.done(plan.run_folder(task)):
            _clean(plan, task)
            display.skipped(task, "done before")
        elif task.strategy in failed:
            display.skipped(task, "not tried, since this strategy has just failed")
        else:
            outcome = _run(plan, planned, task, display, interruption)
            if outcome.state == "interrupted":
                return False
            if outcome.state != "done":
                failed.add(task.strategy)
    return True


def _run(plan: Plan, planned: Planned, task: Task, display: Display, interruption: Interruption) -> Outcome:
    words = [*planned.words, f"run.dir={plan.folder / 'runs'}", f"run.name={task.name}"]
    command = launching.command(planned.launcher, plan.config, planned.nproc, words, plan.ranks_per_node)
    log = plan.folder / "logs" / f"{task.name}.log"
    log.parent.mkdir(exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    display.started(task, plan.run_folder(task))
    began = time.monotonic()
    environment = {**os.environ, "COLUMNS": COLUMNS, **planned.env}
    stop = launching.starter(planned.launcher).stop
    try:
        ending, code = launching.run(command, environment, log, planned.timeout_s, stop, interruption, display.look)
        said = outcomes.end_of(log, start)
    except OSError as error:
        ending, code, said = "exited", 1, f"{command[0]} cannot be started: {error.strerror or error}"
    done = outcomes.done(plan.run_folder(task))
    state, reason = outcomes.judge(ending, code, done, said, planned.timeout_s)
    outcome = Outcome(task.strategy, task.repeat, state, reason, code, time.monotonic() - began, command)
    outcomes.save(plan.folder, outcome)
    _clean(plan, task)
    display.ended(outcome)
    return outcome


def _clean(plan: Plan, task: Task) -> None:
    """Remove the checkpoints of a run that is done, which nobody reads any more."""
    if not plan.keep_checkpoints and outcomes.done(plan.run_folder(task)):
        shutil.rmtree(plan.run_folder(task) / "checkpoints", ignore_errors=True)
