"""A comparison from folders alone: of a plan and its runs, or of single runs that somebody names. Imports no torch."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttrain.compare import outcomes, plan
from disttrain.compare.comparison import Comparison, Group, NotRun, compared
from disttrain.compare.plan import Plan, Planned, Task
from disttrain.config.problems import Problem, RefusedInput
from disttrain.report import Run, read_run


def of_folders(folders: Sequence[Path]) -> Comparison:
    """The comparison that a folder holds, or that several runs make. Raises RefusedInput where nothing is done."""
    if len(folders) == 1 and (folders[0] / plan.FILE).exists():
        return of_plan(plan.read(folders[0]))
    return of_runs(folders)


def of_plan(planned: Plan) -> Comparison:
    """The comparison of a plan, from the runs in its folder. Raises RefusedInput where none is done."""
    groups, not_run = [], []
    for strategy in planned.strategies:
        tasks = [task for task in planned.tasks if task.strategy == strategy.name]
        done = [task for task in tasks if outcomes.done(planned.run_folder(task))]
        if done:
            command = shlex.join(
                ["disttrain", "train", planned.config, "--nproc", str(strategy.nproc), *strategy.words]
            )
            runs = [read_run(planned.run_folder(task)) for task in done]
            groups.append(Group(strategy.name, strategy.about, strategy.own, command, runs))
        not_run += _not_run(planned, strategy, [task for task in tasks if task not in done])
    if not groups:
        reasons = "; ".join(f"{n.name} {n.state}, {n.reason}" for n in not_run[:3])
        raise RefusedInput([Problem((str(planned.folder),), f"no run of this comparison is done: {reasons}",
                                    f"run disttrain compare {planned.sweep}, and read logs/")])  # fmt: skip
    return compared(planned.folder.resolve().name, groups, not_run, planned.baseline, planned.price_per_rank_hour,
                    planned.currency)  # fmt: skip


def of_runs(folders: Sequence[Path]) -> Comparison:
    """The comparison of single runs; NAME-1, NAME-2, ... that differ in nothing but the seed are repeats of NAME.

    Raises RefusedInput where a folder is no run, or none of them is done.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    not_run = []
    for run in map(read_run, folders):
        if run.summary is None or run.summary["stop_reason"] == "interrupted" or not run.steps:
            not_run.append(NotRun(run.name, None, "not done", "it is running, or it was interrupted or killed", None))
        else:
            alike = json.dumps([run.header.get("world_size"), _config(run)], sort_keys=True)
            found.setdefault((re.sub(r"-\d+$", "", run.name), alike), []).append(run)
    if not found:
        raise RefusedInput([Problem(tuple(map(str, folders)), "none of these runs is done", "give runs that ended")])
    first = next(iter(found.values()))[0]
    groups: list[Group] = []
    for (name, _), runs in found.items():
        name = name if len(runs) > 1 else runs[0].name
        if name in {group.name for group in groups}:
            name = str(runs[0].folder)
        groups.append(Group(name, None, _changed(_config(first), _config(runs[0])), None, runs))
    return compared("runs", groups, not_run, groups[0].name, None, "")


def _not_run(planned: Plan, strategy: Planned, missing: Sequence[Task]) -> list[NotRun]:
    """Why repeats of a strategy have no result."""
    name, about = strategy.name, strategy.about
    if not missing:
        return []
    if strategy.refused:
        reason = "; ".join(f"{p.message} ({', '.join(p.settings)}; {p.fix})" for p in strategy.refused)
        return [NotRun(name, about, "refused", reason, None)]
    tried = [outcome for task in missing if (outcome := outcomes.read(planned.folder, task))]
    if not tried:
        repeats = ", ".join(str(task.repeat) for task in missing)
        return [NotRun(name, about, "not yet run", f"repeat {repeats}", None)]
    return [
        NotRun(name, about, o.state, f"repeat {o.repeat}: {o.reason}", f"logs/{name}-{o.repeat}.log") for o in tried
    ]


def _config(run: Run) -> dict[str, Any]:
    """What a run was configured to do, less its name, its seed and its sinks."""
    tree = {key: value for key, value in (run.header.get("config") or {}).items() if key != "log"}
    return tree | {"run": {k: v for k, v in tree.get("run", {}).items() if k not in ("name", "dir", "seed")}}


def _changed(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Settings in which two configs differ, as words of the second."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [word for k in {**before, **after} for word in _changed(before.get(k), after.get(k), f"{prefix}{k}.")]
    return [] if before == after else [f"{prefix[:-1]}={json.dumps(after)}"]
