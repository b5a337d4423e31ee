"""`disttrain plan`: which layout is fastest on so many devices, does it fit, and where its time and memory go. No torch."""

import json as json_text
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from disttrain.config.schema import Config
    from disttrain.planner.report import Counted
    from disttrain.planner.search import Plan
    from disttrain.planner.speeds import Speeds

SAMPLE = 8
"""Layouts that a validation trains."""


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one on each device.")],
    device: Annotated[
        str,
        typer.Option(help="A device of the table (h200-sxm, ...), measured, or a JSON file of `disttrain calibrate`."),
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
    count: Annotated[
        bool,
        typer.Option(
            "--count", help="Run the fastest layout on tensors without values, and count the memory it holds."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write: the config under the fastest layout.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Train a sample of layouts on this machine, and show how wrong that was.")
    ] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="Layouts to train; 8 if not given.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Markdown file of the validation, or page with a place for it.")
    ] = None,
) -> None:
    """Rank every legal layout by predicted step time and memory, and say why others are rejected; writes the best config."""
    from disttrain.config.load import load
    from disttrain.planner import config as planning
    from disttrain.planner.search import search

    _refuse_unused(validate, json, table, sample)
    given = load(config, overrides or [])
    settings = planning.plannable(given)
    speeds = planning.speeds_for(settings, device, gpus, gpus_per_host, between_gbps)
    planning.refuse_hopeless(settings, gpus)
    if validate:
        planning.refuse_validation(given, device, speeds, gpus)
    limit = speeds.memory_bytes * (1 - headroom)
    found = search(settings, gpus, speeds, limit, keep=top)
    counted = _counted(found, settings, gpus, speeds) if count and found.best else None
    _show(found, settings, gpus, speeds, limit, top, json, counted)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(planning.planned(given, found.best[0].layout), encoding="utf-8")
        typer.echo(f"written: {out}, {found.best[0].layout.name}", err=json)
    if validate:
        raise typer.Exit(_validate(given, settings, gpus, speeds, limit, sample or SAMPLE, table))


def _refuse_unused(validate: bool, json: bool, table: Path | None, sample: int | None) -> None:
    for name, value in (("--table", table), ("--sample", sample)):
        if value is not None and not validate:
            raise typer.BadParameter("it goes with --validate only", param_hint=name)
    if json and validate:
        raise typer.BadParameter("a validation is a table: --json or --validate", param_hint="--json")


def _counted(found: "Plan", settings: "Config", world: int, speeds: "Speeds") -> "Counted":
    """What the fastest layout's worst rank holds when the code that would train it runs, without values."""
    from rich.console import Console

    from disttrain.planner.report import Counted
    from disttrain.rehearsal.everyone import count_most

    best = found.best[0]
    with Console(stderr=True).status(f"counting the memory of {best.layout.name}"):
        device_type = "cuda" if speeds.accelerator else "cpu"
        trace = count_most(best.layout.applied(settings), world, best.memory.stage, device_type)
    return Counted(trace.rank, trace.live and trace.live.total, trace.error)


def _show(
    found: "Plan", settings: "Config", world: int, speeds: "Speeds", limit: float, top: int, as_json: bool,
    counted: "Counted | None",
) -> None:  # fmt: skip
    """Print the plan. Ends with exit code 1, and what would help, where nothing fits."""
    from disttrain.loggers.console import for_tables
    from disttrain.planner import config as planning
    from disttrain.planner import report

    if as_json:
        typer.echo(json_text.dumps(report.as_values(found, settings, world, speeds, limit, top, counted), indent=2))
    else:
        for_tables().print(report.shown(found, settings, world, speeds, limit, top, counted), highlight=False)
    if not found.best:
        enough = planning.enough_ranks(settings, world, speeds, limit)
        for line in report.nothing_fits(found, limit, enough, world):
            typer.echo(line, err=True)
        raise typer.Exit(1)


def _validate(
    given: "Config", settings: "Config", world: int, speeds: "Speeds", limit: float, sample: int, table: Path | None
) -> int:
    """Train the sample, show and write the table; 1 where a layout could not be trained."""
    from disttrain.loggers.console import for_tables
    from disttrain.planner import validated
    from disttrain.planner.validation import validate
    from disttrain.verify.plan import config_hash

    console = for_tables()
    folder = Path(given.run.dir) / f"validation-{config_hash(given)[:8]}-{world}-{speeds.precision}"
    found = validate(
        given, settings, world, speeds, limit, sample, given.run.seed, folder,
        lambda text: console.print(text, style="dim", highlight=False),
    )  # fmt: skip
    console.print(validated.shown(found), highlight=False)
    if table is not None:
        validated.write(table, validated.markdown(found, settings, world, speeds))
        typer.echo(f"written: {table}")
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if len(found.good) < len(found.trained) else 0
