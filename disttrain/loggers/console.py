"""The terminal: a live display on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from disttrain.config.schema import Config
from disttrain.loggers import readable
from disttrain.loggers.progress import Progress, farewell, held_out_text, title

PLAIN_SECONDS = 2.0
"""Least time between two plain step lines."""
REFRESHES_PER_SECOND = 2
TABLE_COLUMNS = 160
"""Width of wide tables where there is no terminal."""
_SHOWN_ELSEWHERE = {"sink_failed"}
"""Events that the composite itself says on stderr."""


def for_tables() -> Console:
    """Where wide tables are shown: as wide as the terminal; a file has room for all columns."""
    return Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)


def open_console(config: Config) -> "LiveConsole | PlainConsole | None":
    """The display that `log.console` asks for; auto is live on a terminal that can move its cursor."""
    mode = config.log.console
    if mode == "auto":
        console = Console()
        mode = "live" if console.is_terminal and not console.is_dumb_terminal else "plain"
    if mode == "none":
        return None
    return LiveConsole(config) if mode == "live" else PlainConsole(config)


class PlainConsole:
    """One line a step record, the first and the last always, in between at most one in PLAIN_SECONDS."""

    name = "console"

    def __init__(self, config: Config, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._progress = Progress(config)
        self._stream = stream or sys.stdout
        self._clock = clock
        self._printed_at: float | None = None
        self._pending = False

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        self._progress.take(record)
        kind = record["kind"]
        if kind == "step":
            self._pending = True
            due = self._printed_at is None or self._clock() - self._printed_at >= PLAIN_SECONDS
            if due or self._progress.step == self._progress.total_steps:
                self._print_step()
        elif kind == "eval":
            self._print_step()
            self._print(f"{self._progress.at(record['step'])}  {held_out_text(record)}")
        elif kind == "header":
            self._print(title(record))
        elif kind == "summary":
            self._print_step()
            self._print(farewell(record))
        elif record["event"] not in _SHOWN_ELSEWHERE:
            where = "" if record["step"] is None else f"{self._progress.at(record['step'])}  "
            self._print(where + record["message"])

    def close(self) -> None:
        """Print the last step if it was held back."""
        self._print_step()

    def _print_step(self) -> None:
        if not self._pending:
            return
        self._pending = False
        self._printed_at = self._clock()
        progress = self._progress
        state = [f"{label} {text}" for label, text in progress.state()]
        (tokens, unit), (step_time, _) = list(progress.pace())[:2]
        left = progress.seconds_left
        ending = [f"{readable.duration(left)} left"] if left else []
        self._print("  ".join([progress.at(), *state, f"{tokens} {unit}", step_time, *ending]))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveConsole:
    """Three lines that stay at the bottom: bar, state, pace. Messages and evaluations scroll above them.

    rich hides the cursor while it draws; `close` brings it back, so close it also after an error or Ctrl-C.
    """

    name = "console"

    def __init__(self, config: Config, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self._progress = Progress(config)
        self._clock = clock
        self._arrived = clock()
        self._console = console or Console(force_terminal=True, highlight=False)
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            vertical_overflow="crop",
        )
        self._live.start()

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        self._progress.take(record)
        kind = record["kind"]
        if kind == "step":
            self._arrived = self._clock()
        elif kind == "eval":
            self._say(self._progress.at(record["step"]), held_out_text(record))
        elif kind == "header":
            self._console.print(Text(title(record), style="bold"))
        elif kind == "summary":
            self._live.stop()
            self._console.print(Text(farewell(record), style="bold"))
        elif record["event"] not in _SHOWN_ELSEWHERE:
            self._say("" if record["step"] is None else self._progress.at(record["step"]), record["message"])

    def close(self) -> None:
        """Remove the display and show the cursor."""
        self._live.stop()

    def _say(self, where: str, message: str) -> None:
        self._console.print(Text.assemble((where, "cyan"), "  " if where else "", message), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the three lines, with the clock running on since the last record."""
        progress = self._progress
        since = self._clock() - self._arrived
        elapsed = progress.latest.get("elapsed_seconds", 0.0) + since
        left = progress.seconds_left
        times = f"{readable.duration(elapsed)} elapsed"
        if left is not None:
            times += f", {readable.duration(max(left - since, 0.0))} left"
        fraction = progress.fraction
        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        middle = (
            Text("")
            if fraction is None
            else ProgressBar(total=1.0, completed=fraction, complete_style="cyan", finished_style="cyan")
        )
        bar.add_row(Text(progress.at(), style="cyan"), middle, Text(times, style="dim"))
        yield Group(bar, self._state_line(), self._pace_line())

    def _state_line(self) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        for label, text in self._progress.state():
            line.append(f"{label} ", style="dim").append(f"{text}  ", style=_alarm(text))
            if label == "loss" and self._progress.held_out:
                line.append("held-out ", style="dim")
                line.append(f"{readable.loss(self._progress.held_out['eval_loss'])}  ")
        return line if line else Text("waiting for the first step", style="dim")

    def _pace_line(self) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        for text, unit in self._progress.pace():
            line.append(f"{text} ").append(f"{unit}  ", style="dim")
        memory = self._progress.memory()
        if memory:
            line.append(memory.rsplit(" ", 1)[0] + " ").append(memory.rsplit(" ", 1)[1] + " memory", style="dim")
        return line


def _alarm(text: str) -> str:
    return "bold red" if text in ("nan", "inf", "-inf") else "bold"
