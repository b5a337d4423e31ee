"""`disttrain check`: what is known to be wrong before a run, what it will be like, and, rehearsed, who calls what."""

from pathlib import Path
from typing import Annotated

import typer

from disttrain.importing import at_once


def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks the run would have.")] = 1,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Rehearse steps of every rank without data, compare what they send, and count the bytes they hold.",
        ),
    ] = False,
) -> None:
    """List every problem of a config at once, or show its mesh, batch arithmetic and predicted memory."""
    from rich.console import Console

    from disttrain import preflight
    from disttrain.config.load import load
    from disttrain.config.problems import RefusedInput
    from disttrain.overview import likely_vocabulary, overview

    settings, console = load(config, overrides or []), Console()
    problems = preflight.problems(settings, world_size)
    if trace:
        from disttrain.rehearsal import refused

        problems += refused(settings)
    if problems:
        raise RefusedInput(problems)
    console.print(overview(settings, world_size))
    if not trace:
        return
    with at_once():
        from disttrain.config.load import with_values
        from disttrain.rehearsal.comparison import first_deadlock, first_mismatch
        from disttrain.rehearsal.everyone import rehearse
        from disttrain.rehearsal.report import agreement, deadlock, disagreement, failure, held

    settings = with_values(settings, {"model.vocab_size": likely_vocabulary(settings)})
    traces = rehearse(settings, world_size)
    console.print()
    if failed := [trace for trace in traces if trace.error is not None]:
        console.print(failure(failed[0]), markup=False, highlight=False)
        raise typer.Exit(1)
    if mismatch := first_mismatch(traces):
        told = disagreement(mismatch, traces, settings, world_size)
    elif waiting := first_deadlock(traces):
        told = deadlock(waiting, traces, settings, world_size)
    else:
        console.print(agreement(traces, settings, world_size))
        console.print()
        console.print(held(traces, settings))
        return
    console.print(told, markup=False, highlight=False)
    raise typer.Exit(1)
