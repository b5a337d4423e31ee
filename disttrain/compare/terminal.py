"""The comparison on a terminal: what was found, and a table of at most 100 columns. Imports no torch."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from disttrain.compare.columns import best, columns
from disttrain.compare.comparison import Comparison
from disttrain.compare.sentences import caveats, findings, subject

SHOWN = {"tokens_per_second": "tokens/s", "tokens_per_second_min": "slowest", "tokens_per_second_max": "fastest",
         "ratio": "x base", "memory_bytes": "memory", "loss_at_equal_tokens": "loss at\ntokens",
         "loss_at_equal_seconds": "loss at\ntime", "comm_bytes_per_step": "sent a\nstep",
         "cost_per_million_tokens": "cost"}  # fmt: skip
"""Columns that fit a terminal of 100, and their short headings."""
LEAST = ("tokens_per_second_min", "tokens_per_second_max", "comm_bytes_per_step", "loss_at_equal_seconds")
"""What narrower ones do without, in this order."""
REASON = 160
"""Characters of a reason; the report has all of them."""


def show(comparison: Comparison, console: Console) -> None:
    """Print it."""
    console.print(Text(subject(comparison), style="bold"), "", _fitting(comparison, console), "")
    _section(console, "In short", [Text(text) for text in findings(comparison)])
    reasons = [
        Text.assemble((f"{n.name} {n.state}: ", "red"), n.reason[:REASON] + (" ..." if len(n.reason) > REASON else ""))
        for n in comparison.not_run
    ]
    _section(console, "What could not run, and why", reasons)
    _section(console, "To keep in mind", [Text(text) for text in caveats(comparison)])


def _section(console: Console, title: str, lines: Sequence[Text]) -> None:
    """A heading and a list; nothing where the list is empty."""
    if not lines:
        return
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("-", line)
    console.print(Text(title, style="bold"))
    console.print(grid, "")


def _fitting(comparison: Comparison, console: Console) -> Table:
    """The table with as many columns as the terminal takes."""
    for left_out in range(len(LEAST)):
        made = table(comparison, LEAST[:left_out])
        if console.measure(made, options=console.options.update(width=1000)).maximum <= console.width:
            return made
    return table(comparison, LEAST)


def table(comparison: Comparison, left_out: Sequence[str] = ()) -> Table:
    """A row a strategy; stars are on the Pareto front, the best of a column is bold."""
    shown = [c for c in columns(comparison) if c.key in SHOWN and c.key not in left_out]
    made = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    made.add_column("strategy", no_wrap=True, vertical="bottom")
    for column in shown:
        made.add_column(SHOWN[column.key], justify="right", no_wrap=True, vertical="bottom")
    tops = [best(column, comparison.strategies) for column in shown]
    for s in comparison.strategies:
        star = " *" if s.name in comparison.front else ""
        texts = [column.show(s.values[column.key]) for column in shown]
        cells = [Text(text, style="bold green" if text == top else "") for text, top in zip(texts, tops, strict=True)]
        made.add_row(Text(s.name + star, style="bold" if star else ""), *cells)
    made.caption = "* on the Pareto front of throughput and memory; the best of a column is green"
    made.caption_justify = "left"
    return made
