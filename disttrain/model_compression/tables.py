"""The table of `disttrain measure`, for a terminal and as Markdown."""

from collections.abc import Sequence

from rich.table import Table as Shown

from disttrain.loggers import readable
from disttrain.model_compression.measuring import Latency, Row, Table

MIB = 2.0**20


def shown(table: Table) -> Shown:
    """For a terminal: as `markdown`, two of its columns in one of two lines, but for the scores."""
    found = Shown(box=None, pad_edge=False, header_style="bold", caption=about(table), caption_justify="left")
    stacked = len(_head(table)) - len(table.rows[0].scores)
    for number, column in enumerate(_paired(_head(table), stacked)):
        found.add_column(column, justify="right" if number else "left", overflow="fold", min_width=8 if number else 14)
    for row in table.rows:
        found.add_row(*_paired(_cells(row, table.rows[0]), stacked))
    return found


def _paired(cells: Sequence[str], stacked: int) -> list[str]:
    """The first so many in twos."""
    return ["\n".join(cells[at : at + 2]) for at in range(0, stacked, 2)] + list(cells[stacked:])


def markdown(table: Table) -> str:
    """As a Markdown table with what was measured how below it."""
    head = _head(table)
    lines: list[Sequence[str]] = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    lines += [_cells(row, table.rows[0]) for row in table.rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{about(table)}\n"


def about(table: Table) -> str:
    """How the numbers were made."""
    return (
        f"Forward passes of whole batches of {table.sequence_length} tokens a sequence: medians of {table.repeats} rounds, "
        f"tenth and ninetieth percentile in brackets, x is the ratio to the first model within a round. Threads: "
        f"{table.threads}; {table.device}, torch {table.torch}."
    )


def _head(table: Table) -> list[str]:
    times = [column for latency in table.rows[0].latencies
             for column in (f"ms, batch {latency.batch}", f"x, batch {latency.batch}")]  # fmt: skip
    return ["model", "method", "parameters", "zeros", "MiB", "size", *times, *table.rows[0].scores]


def _cells(row: Row, first: Row) -> list[str]:
    times = [cell for latency in row.latencies for cell in (_milliseconds(latency), f"{latency.ratio:.2f}")]
    scores = [f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in first.scores]
    return [
        row.folder,
        row.method,
        readable.count(row.parameters),
        readable.percent(row.zeros),
        f"{row.nbytes / MIB:.2f}",
        readable.percent(row.nbytes / first.nbytes),
        *times,
        *scores,
    ]


def _milliseconds(latency: Latency) -> str:
    median, low, high = (f"{1e3 * seconds:.3g}" for seconds in (latency.median, latency.low, latency.high))
    return f"{median} ({low}-{high})"
