"""`disttrain calibrate`: what this machine can do, measured for the planner."""

import os
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from disttrain.interruption import Interruption


class Arithmetic(StrEnum):
    """Precision of the products; as the setting `precision`."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="File to write; where `plan --device measured` looks if not given.")
    ] = None,
    precision: Annotated[Arithmetic, typer.Option(help="Precision of the products.")] = Arithmetic.auto,
    nproc: Annotated[
        int | None, typer.Option(min=2, help="Local ranks: as many as the host has GPUs, or cores, if not given.")
    ] = None,
) -> None:
    """Measure products, memory, operators and links of this machine for `disttrain plan`; in a launcher, of all its
    hosts."""
    from disttrain import launch
    from disttrain.config.problems import Problem, RefusedInput

    info = launch.detect(os.environ)
    inside = info.launcher != "none"
    problems = []
    if inside and nproc is not None:
        problems.append(Problem((f"--nproc {nproc}", f"launcher {info.launcher}"), "the launcher already started the ranks",
                                "leave --nproc away, or run disttrain outside the launcher"))  # fmt: skip
    if inside and info.world_size == 1:
        problems.append(Problem((f"launcher {info.launcher}", "world size 1"), "one rank has no links to measure",
                                "start two ranks or more"))  # fmt: skip
    if out is not None and (out.is_dir() or not _writable(out)):
        problems.append(Problem((f"--out {out}",), "no such file can be written", "name a file in a folder of yours"))
    if problems:
        raise RefusedInput(problems)
    if inside:
        raise typer.Exit(_as_a_rank(out, precision.value))
    from disttrain import local_ranks

    ranks = nproc or _ranks_of_this_host()
    raise typer.Exit(local_ranks.start(ranks, partial(_as_a_rank, out, precision.value), None, local_ranks.method()))


def _writable(path: Path) -> bool:
    """Whether the nearest folder above it that is there can be written to."""
    folder = next(parent for parent in path.expanduser().absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK)


def _ranks_of_this_host() -> int:
    """One for each GPU, or core; at least two."""
    import torch

    return max(2, torch.cuda.device_count() or len(os.sched_getaffinity(0)))


def _as_a_rank(out: Path | None, precision: str, interruption: "Interruption | None" = None) -> int:
    """Measure; the first rank writes and shows it."""
    from disttrain.calibration import machine, report
    from disttrain.launch.mpi import locate
    from disttrain.loggers.console import for_tables
    from disttrain.planner import speeds

    info, console = locate(os.environ), for_tables()
    found = machine.measure(
        info, precision, lambda text: console.print(f"measuring {text}", style="dim", highlight=False)
    )
    if info.rank == 0:
        path = out or speeds.MEASURED
        console.print(report.shown(found))
        try:
            speeds.write(path, found.speeds, report.details(found))
        except OSError as error:
            typer.echo(f"disttrain: {path} could not be written: {error.strerror}", err=True)
            return 1
        console.print(f"written: {path}", highlight=False)
    return 0
