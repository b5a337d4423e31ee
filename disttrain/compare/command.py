"""`disttrain compare` and `disttrain report`. Imports no torch, and what takes long when it is needed."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from disttrain.compare.plan import Plan, Task
    from disttrain.compare.schema import Sweep

PLAN_FILE = "compare.json"


def compare(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file with the strategies (docs/compare.md).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace settings of all strategies.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of runs and report; runs/<name of SWEEP> by default.")
    ] = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Check every strategy, list the runs, start nothing.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Only make the report of what is done.")] = False,
    task: Annotated[int | None, typer.Option(min=1, help="Do the run with this number and report nothing.")] = None,
    array: Annotated[bool, typer.Option("--array", help="Write a Slurm script that does every run as a task.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="With --array: hand it to sbatch and print the id.")] = False,
) -> None:
    """Run strategies on one model and data, interleaved and repeated, and report which is best; goes on where it stopped.
    0 all ran, 1 some failed."""
    from disttrain import launch
    from disttrain.compare import plan as plans
    from disttrain.compare.schema import load_sweep
    from disttrain.config.problems import Problem, RefusedInput

    if sum((list_runs, report_only, task is not None, array)) > 1 or (submit and not array):
        raise typer.BadParameter("give one of --list, --report-only, --task and --array; --submit goes with --array")
    folder = out or Path("runs") / sweep.stem
    if report_only:
        _report(plans.read(folder), publish=True)
        return
    if (rank := launch.detect(os.environ)).launcher != "none":
        raise RefusedInput([Problem(("disttrain compare", f"launcher {rank.launcher}"),
                                    "it starts the ranks itself", "run it once, outside the launcher")])  # fmt: skip
    asked, words = load_sweep(sweep), overrides or []
    plan = plans.make(asked, sweep, folder, words)
    if (folder / PLAN_FILE).exists() and (problems := plans.changes(plans.read(folder), plan)):
        raise RefusedInput(problems)
    if list_runs:
        _list(plan)
    elif array:
        _array(asked, plan, [str(sweep), *words, "--out", str(folder)], submit)
    else:
        raise typer.Exit(_run(plan, task))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run, a comparison, or runs to compare.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report of several runs; runs/report.")] = None,
) -> None:
    """Print the summary of a run and draw its loss curve again; compare several; or make a comparison's report again."""
    if len(runs) == 1 and not (runs[0] / PLAN_FILE).exists():
        if out is not None:
            raise typer.BadParameter("the report of one run is in its folder", param_hint="--out")
        from disttrain.run import show

        show(runs[0])
        return
    from disttrain.compare.reading import of_folders
    from disttrain.compare.report import write
    from disttrain.compare.terminal import show as show_comparison

    comparison = of_folders(runs)
    folder = out or (runs[0] if len(runs) == 1 else Path("runs") / "report")
    write(comparison, folder)
    show_comparison(comparison, _console())
    _where(folder)


def _run(plan: "Plan", number: int | None) -> int:
    """Do what is not done, one run or all, and report; the exit code."""
    import contextlib

    from disttrain.compare import outcomes, runner
    from disttrain.compare.progress import Terminal
    from disttrain.failures import interrupted
    from disttrain.folders import exclusive
    from disttrain.interruption import Interruption

    interruption = Interruption().listen()
    tasks = [_task(plan, number)] if number else plan.tasks
    plan.folder.mkdir(parents=True, exist_ok=True)
    alone = exclusive(plan.folder, "comparing", "use another --out")
    with contextlib.nullcontext() if number else alone:
        _keep(plan)
        _prepare(plan, tasks, interruption)
        with Terminal(plan, tasks, _console()) as terminal:
            if not runner.run_all(plan, tasks, terminal, interruption):
                return interrupted()
        done = [outcomes.done(plan.run_folder(t)) for t in tasks if not plan.strategy(t.strategy).refused]
        if number:
            return 0 if all(done) else 1
        if any(done):
            _report(plan, publish=True)
        else:
            _console().print(f"no run is done; what they printed is in {plan.folder / 'logs'}", highlight=False)
    return 0 if done and all(done) else 1


def _keep(plan: "Plan") -> None:
    """Write the plan, unless it is there: tasks of an array that begin together do not replace it."""
    from disttrain.compare.plan import save
    from disttrain.folders import write_atomically

    path, text = plan.folder / PLAN_FILE, save(plan)
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text)


def _task(plan: "Plan", number: int) -> "Task":
    if number > len(plan.tasks):
        raise typer.BadParameter(f"there are {len(plan.tasks)} runs; see --list", param_hint="--task")
    return plan.tasks[number - 1]


def _prepare(plan: "Plan", tasks: "list[Task]", interruption) -> None:
    """Prepare the data before the first run, whose time-out should not meet it; what is prepared costs nothing."""
    from disttrain import preparing
    from disttrain.config.load import load

    seen = []
    for strategy in plan.strategies:
        what = (strategy.config["data"], strategy.config["model"]["family"])
        if strategy.refused or what in seen or strategy.name not in {task.strategy for task in tasks}:
            continue
        seen.append(what)
        preparing.prepare(load(plan.config, strategy.words), interruption, quiet=False)


def _report(plan: "Plan", publish: bool) -> None:
    """Write the report, show it, and send it to W&B where the config asks for that."""
    from disttrain.compare.reading import of_plan
    from disttrain.compare.report import write
    from disttrain.compare.terminal import show
    from disttrain.compare.wandb import publish as send
    from disttrain.config.load import load

    comparison, console = of_plan(plan), _console()
    write(comparison, plan.folder)
    console.print()
    show(comparison, console)
    _where(plan.folder)
    config = load(plan.config, plan.common)
    if publish and config.log.wandb:
        send(comparison, config, plan.folder)


def _where(folder: Path) -> None:
    from disttrain.compare.report import FILES

    _console().print(f"open {folder / FILES[0]} in a browser; beside it: {', '.join(FILES[1:])}", highlight=False)


def _list(plan: "Plan") -> None:
    """Every run in its order, and what is left out."""
    from rich.table import Table
    from rich.text import Text

    from disttrain.compare import outcomes

    table = Table(box=None, pad_edge=False)
    for heading in ("task", "run", "ranks", "settings of its own", "state"):
        table.add_column(heading, overflow="fold")
    for number, task in enumerate(plan.tasks, start=1):
        strategy = plan.strategy(task.strategy)
        state = "refused" if strategy.refused else "done" if outcomes.done(plan.run_folder(task)) else ""
        table.add_row(str(number), Text(task.name), str(strategy.nproc), Text(" ".join(strategy.own)), state)
    console = _console()
    console.print(table)
    for strategy in plan.strategies:
        for problem in strategy.refused:
            console.print(Text(f"{strategy.name} is left out: {problem.message} ({problem.fix})", style="red"))


def _array(sweep: "Sweep", plan: "Plan", words: list[str], submit: bool) -> None:
    """Print the script of an array job, or submit it."""
    from disttrain import slurm_script
    from disttrain.compare.array import script

    text = script(sweep, plan, words, sys.executable)
    plan.folder.mkdir(parents=True, exist_ok=True)
    _keep(plan)
    if not submit:
        typer.echo(text, nl=False)
        return
    typer.echo(slurm_script.submit(text))
    typer.echo(f"when it is done: disttrain compare {words[0]} --out {plan.folder} --report-only", err=True)


def _console():
    from rich.console import Console

    return Console()
