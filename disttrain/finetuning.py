"""`disttrain finetune` and `disttrain evaluate` on the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer


def finetune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings of a task.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Local ranks of each run.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with seeds of their own, run.seed and up.")] = 1,
    folds: Annotated[bool, typer.Option("--folds", help="A run for each of task.folds: cross-validation.")] = False,
) -> None:
    """Train for a task as `train` does, with several seeds or folds if asked, and show the mean and the spread of scores."""
    from rich.console import Console

    from disttrain.config.load import load
    from disttrain.config.problems import Problem, RefusedInput
    from disttrain.tasks import repeated

    words = list(overrides or [])
    settings, console = load(config, words), Console()
    runs = repeated.parts(settings, seeds, folds)
    for number, part in enumerate(runs, start=1):
        if repeated.done(settings, part) is not None:
            console.print(f"{part.name} is done", highlight=False)
            continue
        if len(runs) > 1:
            console.print(f"[bold]run {number} of {len(runs)}: {part.name}", highlight=False)
        if code := repeated.run_part(config, words, part, nproc):
            raise typer.Exit(code)
    summaries = [summary for part in runs if (summary := repeated.done(settings, part)) is not None]
    found = repeated.collected(summaries) if summaries else {}
    if not found:
        raise RefusedInput([Problem((f"run.name={settings.run.name}",), "no run has a score", "look at its logs")])
    console.print()
    console.print(repeated.table(found))
    if len(runs) > 1:
        console.print(f"\nwritten: {repeated.write(settings, found, runs)}", highlight=False)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/mr_textcnn.")],
    split: Annotated[str | None, typer.Option(help="Split to evaluate; that of the run if not given.")] = None,
    path: Annotated[str | None, typer.Option(help="Another folder with the set's files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss and official scores of a trained model, computed in this one process."""
    from rich.console import Console
    from rich.table import Table

    from disttrain.loggers import readable
    from disttrain.tasks.evaluation import evaluate as scores_of_run

    found = scores_of_run(run, split, path)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("loss", readable.loss(found["eval_loss"]))
    for label, value in readable.scores(found):
        table.add_row(label, value)
    Console().print(table)
