"""`disttrain plan`: which layout is fastest on so many devices, does it fit, and where its time and memory go. No torch."""

import json as json_text
import sys
from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one on each device.")] = 8,
    device: Annotated[
        str,
        typer.Option(help="A device of the table (a100-sxm-80gb, h200-sxm, ...), or a JSON file of measured speeds."),
    ] = "measured",
    gpus_per_host: Annotated[int | None, typer.Option(min=1, help="Ranks of a host; 8, or as measured.")] = None,
    between_gbps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Gbit/s of each device between hosts; the vendor's machines' by default."),
    ] = None,
    headroom: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Share of the memory to leave, for the allocator's fragments for example."),
    ] = 0.0,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: seconds, bytes, shares.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write: the config under the fastest layout.")] = None,
) -> None:
    """Rank every legal layout by predicted step time and memory, and say why others are rejected; writes the best config."""
    from rich.console import Console

    from disttrain.config.load import load
    from disttrain.planner import config as planning
    from disttrain.planner import report
    from disttrain.planner.search import search

    given = load(config, overrides or [])
    settings = planning.plannable(given)
    speeds = planning.speeds_for(settings, device, gpus, gpus_per_host, between_gbps)
    planning.refuse_hopeless(settings, gpus)
    limit = speeds.memory_bytes * (1 - headroom)
    found = search(settings, gpus, speeds, limit, keep=top)
    if json:
        typer.echo(json_text.dumps(report.as_values(found, settings, gpus, speeds, limit, top), indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(report.shown(found, settings, gpus, speeds, limit, top), highlight=False)
    if not found.best:
        enough = planning.enough_ranks(settings, gpus, speeds, limit)
        for line in report.nothing_fits(found, limit, enough, gpus):
            typer.echo(line, err=True)
        raise typer.Exit(1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(planning.planned(given, found.best[0].layout), encoding="utf-8")
        typer.echo(f"written: {out}, {found.best[0].layout.name}", err=json)
