"""The comparison on a terminal: what was found, and a table of at most 100 columns. Imports no torch."""

from collections.abc import Iterator

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
"""Columns that fit a terminal, and their short headings."""


def show(comparison: Comparison, console: Console) -> None:
    """Print it."""
    console.print(Text(subject(comparison), style="bold"), "")
    console.print(table(comparison), "")
    for text in _lines(comparison):
        console.print(text)


def table(comparison: Comparison) -> Table:
    """A row a strategy; stars are on the Pareto front, the best of a column is bold."""
    shown = [c for c in columns(comparison) if c.key in SHOWN]
    made = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    made.add_column("strategy", no_wrap=True, vertical="bottom")
    for column in shown:
        made.add_column(SHOWN[column.key], justify="right", no_wrap=True, vertical="bottom")
    tops = [best(column, comparison.strategies) for column in shown]
    for s in comparison.strategies:
        star = " *" if s.name in comparison.front else ""
        values = [s.values[column.key] for column in shown]
        cells = [
            Text(column.show(value), style="bold green" if value is not None and value == top else "")
            for column, value, top in zip(shown, values, tops, strict=True)
        ]
        made.add_row(Text(s.name + star, style="bold" if star else ""), *cells)
    return made


def _lines(comparison: Comparison) -> Iterator[Text]:
    yield from (Text(text) for text in findings(comparison))
    for n in comparison.not_run:
        yield Text.assemble((f"{n.name} {n.state}: ", "red"), n.reason)
    yield from (Text(text, style="dim") for text in caveats(comparison))
