"""How a failure is shown, and with what exit code the command ends. Imports no torch."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disttrain.config.problems import Problem

INTERRUPTED = 130
"""Exit code after a clean end that somebody asked for."""
FIRST_SPEAKS_S = 5.0
"""How long other ranks wait with refused input: launchers end all ranks, the first too, when one has ended."""
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is; refused input is shown by the first one only."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting",
        "timeout caused pair closure", "NCCL communicator was aborted")  # fmt: skip
"""What torch's collectives say where another rank is gone, or late."""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command: problems become a list and exit code 2, an interruption 130, an expected failure one line."""
    try:
        return command() or 0
    except Exception as error:
        return explain(error)
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """Say so; the exit code."""
    print("disttrain: interrupted; nothing is lost, the same command goes on", file=sys.stderr)
    return INTERRUPTED


def lost_a_peer(error: BaseException) -> bool:
    """Whether another rank is gone: a failure that those who are left survive."""
    error = unwrapped(error)
    internal = type(error).__name__ == "HorovodInternalError"
    return internal or (isinstance(error, RuntimeError) and any(words in str(error) for words in LOST))


def unwrapped(error: BaseException) -> BaseException:
    """What failed in a stage of torch's pipelines, which raise another error from it that says only where."""
    while isinstance(error, RuntimeError) and "failed to run" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: Exception) -> int:
    """Show refused input as a list and expected failures in one line; the exit code.

    Anything else keeps its traceback, since it is our mistake.
    """
    from disttrain.config.problems import RefusedInput

    if isinstance(error, RefusedInput):
        ranks = [os.environ.get(name, "") for name in RANK_VARIABLES]
        if any(rank.isdigit() and int(rank) > 0 for rank in ranks):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(FIRST_SPEAKS_S)
        else:
            show_problems(error.problems)
        return 2
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):  # typer's usage errors, and a rank that others do not answer
        show()
        return code
    if isinstance(error, RuntimeError | OSError | FloatingPointError) and type(error).__module__.startswith(
        "disttrain"
    ):
        print(f"disttrain: {error}", file=sys.stderr)
        return 1
    if logging.getLogger().handlers:
        logging.getLogger("disttrain").error("failed", exc_info=error)
    traceback.print_exception(error)
    return 1


def show_problems(problems: "list[Problem]") -> None:
    """Print every problem with its fix to stderr."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    console.print(f"[bold red]disttrain: {count}; nothing was started[/]\n")
    for number, problem in enumerate(problems, start=1):
        console.print(f"[bold]{number:>3}  {escape(', '.join(problem.settings))}[/]", highlight=False)
        console.print(f"     {escape(problem.message)}", highlight=False)
        console.print(f"     [green]fix: {escape(problem.fix)}[/]\n", highlight=False)
