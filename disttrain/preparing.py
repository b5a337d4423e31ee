"""Data is prepared with a progress bar, and an interruption ends it. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disttrain.config.schema import Config
    from disttrain.data.preparation import Prepared, Report
    from disttrain.interruption import Interruption


def prepare(config: "Config", interruption: "Interruption", quiet: bool) -> "Prepared":
    """Prepare the data of a run; what is prepared already costs nothing and shows nothing.

    Raises KeyboardInterrupt when asked to stop: what is complete stays, and the same command goes on from there.
    """
    from disttrain import inputs

    with progress(quiet) as show:

        def report(done: int, total: int, what: str) -> None:
            show(done, total, what)
            if interruption.requested:
                raise KeyboardInterrupt

        prepared = inputs.prepare(config, report)
    if interruption.requested:
        raise KeyboardInterrupt
    return prepared


@contextmanager
def progress(quiet: bool) -> "Iterator[Report]":
    """A progress bar on stderr, shown once there is progress, as the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("preparing data", total=None, visible=False)

        def report(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)

        yield report
