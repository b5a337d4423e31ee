"""What a verification shows while it runs: one row a layout as it ends, and below them how far it is."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from disttrain.verify.compare import PHASES, Difference
from disttrain.verify.proof import Verdict

EQUAL, DIFFERS, NOT_REACHED = "=", "X", "."
SHOWN = PHASES[1:]


class Table:
    """Rows go to the console at once, so that hundreds of layouts scroll; the progress line stays below them.

    On what is no terminal only the rows are written.
    """

    def __init__(self, console: Console, total: int, longest_name: int):
        self.console = console
        self.width = max(longest_name, len("layout"))
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "Table":
        """Write the legend and the head."""
        names = ", ".join(phase.replace("_", " ") for phase in SHOWN)
        self._print(f"phases, in this order: {names}")
        self._print(f"{EQUAL} equal to one process, {DIFFERS} different, {NOT_REACHED} not reached\n")
        self._print(f"{'layout':<{self.width}}  {'phases':<{len(SHOWN)}}  {'worst':>7}  seconds  where", "bold")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the progress line away."""
        self._progress.stop()

    def now(self, what: str) -> None:
        """Say what is running."""
        self._progress.update(self._task, description=what)

    def row(self, verdict: Verdict) -> None:
        """Write one layout's row, and its finding when it has one."""
        largest = max(verdict.worst.values(), key=lambda d: d.excess, default=None)
        worst = verdict.failures[0] if verdict.failures else largest
        line = f"{verdict.layout.name:<{self.width}}  {marks(verdict)}  {_error(worst)}  {verdict.seconds:>7.1f}  "
        self._print(line + (f"{worst.phase}: {worst.name}" if worst else ""), "" if verdict.equal else "red")
        for text in verdict.finding.lines() if verdict.finding else []:
            if text:
                self._print(f"    {text}")
        self._progress.advance(self._task)

    def _print(self, text: str, style: str = "") -> None:
        self._progress.console.print(escape(text), style=style or None, highlight=False, soft_wrap=True)


def marks(verdict: Verdict) -> str:
    """One character a phase."""
    reached = {phase: DIFFERS if d.failed else EQUAL for phase, d in verdict.worst.items()}
    return "".join(reached.get(phase, NOT_REACHED) for phase in SHOWN)


def _error(worst: Difference | None) -> str:
    return f"{worst.error:>7.0e}" if worst else f"{'-':>7}"
