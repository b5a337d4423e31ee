"""`disttrain verify` on the command line."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from disttrain.importing import at_once


class Matrix(StrEnum):
    """Which layouts `verify` takes when none are named."""

    small = "small"
    full = "full"


class ProofPrecision(StrEnum):
    """The arithmetic `verify` compares in."""

    fp64 = "fp64"
    own = "own"


def verify(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    layouts: Annotated[str | None, typer.Option(help="Layouts by name, separated by commas.")] = None,
    matrix: Annotated[Matrix, typer.Option(help="small: each feature once; full: every legal one.")] = Matrix.small,
    precision: Annotated[
        ProofPrecision, typer.Option(help="fp64 to 1e-10, or the run's own against its rounding.")
    ] = ProofPrecision.fp64,
    out: Annotated[Path | None, typer.Option(help="The certificate; verify.json in the run folder by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted certificate.")] = False,
) -> None:
    """Prove that layouts train exactly like one process, on this config's model and data; 0 equal, 1 not."""
    from disttrain import inputs, preflight, preparing
    from disttrain.config.load import load
    from disttrain.config.problems import RefusedInput
    from disttrain.interruption import Interruption

    if layouts and matrix is not Matrix.small:
        raise typer.BadParameter("name layouts or choose a matrix, not both", param_hint="--layouts")
    settings = load(config, overrides or [])
    problems = [*inputs.preflight(settings), *preflight.own_model(settings)]
    if problems:
        raise RefusedInput(problems)
    prepared = preparing.prepare(settings, Interruption(), quiet=False)
    command = " ".join(["disttrain verify", str(config), *(overrides or [])])
    with at_once():
        from disttrain.verify import run
    if precision is not ProofPrecision.fp64:
        command += f" --precision {precision}"
    equal = run(settings, layouts=layouts, matrix=matrix.value, precision=precision.value, prepared=prepared, out=out,
                resume=resume, command=command)  # fmt: skip
    raise typer.Exit(0 if equal else 1)
