"""A calibration for a person and for a file. No torch is needed to read either."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disttrain.planner.speeds import Link, Product

if TYPE_CHECKING:
    from disttrain.calibration.links import Measured
    from disttrain.calibration.machine import Measurements

SHOWN_K = (256, 1024, 4096)
"""Products are shown for these sums."""


def details(found: "Measurements") -> dict[str, Any]:
    """What the planner does not read: how it was measured, and every repeat's spread."""
    return {
        "seconds": found.seconds,
        "versions": found.versions,
        "threads_per_rank": found.threads,
        "share_of_full_speed": dict(found.together),
        "operator_spread": found.operator.spread,
        "products": [
            {"m": p.m, "n": p.n, "k": p.k, "seconds": [t.seconds for t in p.kinds], "spread": [t.spread for t in p.kinds]}
            for p in found.products
        ],
        "operators": [
            {"operator": p.operator, "bytes_per_second": p.bytes_per_second, "spread": p.timed.spread}
            for p in found.passes
        ],
        "collectives": [
            {"between": where, **m._asdict(), "points": [p._asdict() for p in m.points], "link": m.link._asdict()}
            for where, measured in (("ranks of a host", found.inside), ("hosts", found.between))
            for m in measured
        ],
    }  # fmt: skip


def shown(found: "Measurements") -> Group:
    """Tables."""
    speeds = found.speeds
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_column(style="bold", no_wrap=True)
    head.add_column()
    together = ", ".join(f"{share:.0%} with {count} rank{'s' * (count > 1)}" for count, share in found.together)
    head.add_row("device", f"{speeds.device}, {speeds.precision}, {found.threads} threads a rank")
    head.add_row("ranks of a host", f"{speeds.ranks_per_host}, of which {speeds.at_full_speed} compute at full speed "
                                    f"together ({together} at once)")  # fmt: skip
    head.add_row(
        "memory of a rank", f"{speeds.memory_bytes / 1e9:.1f} GB, {speeds.memory_bytes_per_second / 1e9:.1f} GB/s"
    )
    head.add_row("an operator's call", f"{speeds.operator_seconds * 1e6:.1f} us (spread {found.operator.spread:.0%})")
    notes = [Text(f"note: {note}") for note in speeds.notes]
    products = Text("products (m x k) (k x n), GFLOP/s", style="italic")  # longer than its table is wide
    parts = [head, "", products, _products(speeds.products), "", _passes(found), "", _collectives(found), *notes]
    return Group(*parts, Text(f"measured in {found.seconds:.0f} s, with {len(speeds.products)} sizes of products"))


def _products(points: Sequence[Product]) -> Table:
    """GFLOP/s: rows m, columns n, for some k."""
    table = Table(box=None, pad_edge=False)
    kept = sorted((p for p in points if p.k in SHOWN_K), key=lambda p: (p.k, p.m, p.n))
    columns = sorted({p.n for p in kept})
    for name in ("k", "m", *(f"n = {n}" for n in columns)):
        table.add_column(name, justify="right")
    for (k, m), row in groupby(kept, key=lambda p: (p.k, p.m)):
        rates = {p.n: p.flops_per_second for p in row}
        table.add_row(str(k), str(m), *(f"{rates[n] / 1e9:,.0f}" if n in rates else "" for n in columns))
    return table


def _passes(found: "Measurements") -> Table:
    table = Table(
        "operator", "GB/s", "spread", title="passes over memory", title_justify="left", box=None, pad_edge=False
    )
    for p in found.passes:
        table.add_row(p.operator, f"{p.bytes_per_second / 1e9:.1f}", f"{p.timed.spread:.0%}")
    return table


def _collectives(found: "Measurements") -> Table:
    table = Table(title="collectives", title_justify="left", box=None, pad_edge=False)
    for name in ("between", "collective", "ranks", "latency, us", "GB/s", "longest message", "spread"):
        table.add_column(name, justify="left" if name in ("between", "collective") else "right", no_wrap=True)
    for where, measured, link in (("ranks of a host", found.inside, found.speeds.inside),
                                  ("hosts", found.between, found.speeds.between)):  # fmt: skip
        for m in measured:
            table.add_row(where, m.collective, str(m.ranks), *_of(m.link), *_longest(m))
        if measured:
            table.add_row(where, "all together", "", *_of(link), "", "", style="bold")
    return table


def _of(link: Link) -> Iterator[str]:
    yield f"{link.latency_seconds * 1e6:.1f}"
    yield f"{link.bytes_per_second / 1e9:.2f}"


def _longest(measured: "Measured") -> Iterator[str]:
    last = measured.points[-1]
    yield f"{last.message_bytes >> 20} MiB in {last.seconds * 1e3:.1f} ms"
    yield f"{max(p.spread for p in measured.points):.0%}"
