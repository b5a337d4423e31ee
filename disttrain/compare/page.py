"""The comparison as one HTML file that opens without a network: everything it needs is in it. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from importlib import resources
from typing import Any

from disttrain.compare.columns import TABLES, Column, best, columns
from disttrain.compare.comparison import Comparison, Measured
from disttrain.compare.plots import Plot, plots, styles
from disttrain.compare.sentences import caveats, findings, glossary, subject

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What a browser lets the page do: nothing from outside."""


def html(comparison: Comparison) -> str:
    """The page."""
    drawn = plots(comparison)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Comparison: {escape(comparison.name)}</title>",
        f"<style>\n{_file('page.css')}</style>\n</head>\n<body>\n<main>",
        f"<h1>Comparison: {escape(comparison.name)}</h1>",
        f'<p class="dim">{escape(subject(comparison))}</p>',
        *_short(comparison),
        f"<h2>{TABLES[0]}</h2>",
        f'<p class="dim">Click a heading to sort. Green is the best of a column, a <span class="star">&#9733;</span> is on '
        f"the Pareto front. The baseline is {escape(comparison.baseline)}. What the columns mean stands "
        '<a href="#columns">below</a>.</p>',
        _table(comparison, TABLES[0]),
        *_not_run(comparison),
        *(_plot(plot) for plot in drawn if plot.of_learning),
        f"<h2>{TABLES[1]}</h2>",
        _table(comparison, TABLES[1]),
        *(_plot(plot) for plot in drawn if not plot.of_learning),
        *_strategies(comparison),
        '<h2 id="columns">What the columns mean</h2>',
        "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in glossary(comparison)) + "</dl>",
        *_facts(comparison),
        "</main>",
        f'<script type="application/json" id="plots">{_json([asdict(plot) for plot in drawn])}</script>',
        f"<script>{_plotly()}</script>",
        f"<script>\n{_file('page.js')}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _short(comparison: Comparison) -> Iterator[str]:
    yield '<div class="short"><h2>In short</h2><ul>'
    yield from (f"<li>{escape(text)}</li>" for text in findings(comparison))
    yield "</ul><h2>To keep in mind</h2><ul>"
    yield from (f"<li>{escape(text)}</li>" for text in caveats(comparison))
    yield "</ul></div>"


def _table(comparison: Comparison, which: str) -> str:
    shown = columns(comparison, which)
    heads = ['<th data-key="name" title="sort by name">strategy</th>']
    heads += [f'<th data-key="{c.key}" title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in shown]
    bests = [best(c, comparison.strategies) for c in shown]
    rows = [_row(comparison, s, shown, bests) for s in comparison.strategies]
    return (f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>\n' + "\n".join(rows)
            + "\n</tbody></table></div>")  # fmt: skip


def _row(comparison: Comparison, s: Measured, chosen: list[Column], bests: list[str | None]) -> str:
    colour = styles(comparison)[s.name].colour
    star = ' <span class="star" title="on the Pareto front">&#9733;</span>' if s.name in comparison.front else ""
    title = escape(s.group.about or " ".join(s.group.settings) or "the config as it is")
    cells = [f'<td data-value="{escape(s.name)}" title="{title}"><span class="dot" style="background:{colour}"></span>'
             f"{escape(s.name)}{star}</td>"]  # fmt: skip
    for column, top in zip(chosen, bests, strict=True):
        value = s.values[column.key]
        known = value is not None and value == value
        shown = column.show(value)
        good = ' class="best"' if known and shown == top else ""
        cells.append(f'<td{good} data-value="{value if known else ""}">{escape(shown)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _not_run(comparison: Comparison) -> Iterator[str]:
    if not comparison.not_run:
        return
    yield "<h2>What could not run, and why</h2>"
    yield '<div class="wide"><table><thead><tr><th>strategy</th><th class="text">what became of it</th>'
    yield '<th class="text">why</th></tr></thead><tbody>'
    for n in comparison.not_run:
        log = f' <span class="dim">({escape(n.log)})</span>' if n.log else ""
        yield (f'<tr><td title="{escape(n.about or "")}">{escape(n.name)}</td><td class="text"><span class="state">'
               f'{escape(n.state)}</span></td><td class="text">{escape(n.reason)}{log}</td></tr>')  # fmt: skip
    yield "</tbody></table></div>"


def _plot(plot: Plot) -> str:
    return (f'<h2>{escape(plot.title)}</h2>\n<p class="dim">{escape(plot.caption)}</p>\n'
            f'<div class="plot" id="{plot.key}"></div>')  # fmt: skip


def _strategies(comparison: Comparison) -> Iterator[str]:
    yield "<h2>What the strategies are</h2>"
    yield '<div class="wide"><table><thead><tr><th>strategy</th><th class="text">what it is</th>'
    yield '<th class="text">settings of its own</th></tr></thead><tbody>'
    for s in comparison.strategies:
        words = " ".join(s.group.settings) or "the config as it is"
        command = s.group.command
        code = f"<code>{escape(words)}</code>"
        if command:
            code = f"<details><summary>{code}</summary><code>{escape(command)}</code></details>"
        yield (f'<tr><td>{escape(s.name)}</td><td class="text">{escape(s.group.about or "-")}</td>'
               f'<td class="text">{code}</td></tr>')  # fmt: skip
    yield "</tbody></table></div>"


def _facts(comparison: Comparison) -> Iterator[str]:
    """How it was measured."""
    header = comparison.headers[0]
    yield "<h2>How it was measured</h2>"
    yield ("<p>Every run is an ordinary training in processes of its own. All strategies ran once, then all again, so "
           "that a slow hour of the machine is shared. The first steps of every run count in no speed. The records of "
           "each run are in <code>runs/</code>; docs/measurement.md of disttrain has every formula.</p>")  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in (header.get("versions") or {}).items())
    hardware = header.get("hardware") or {}
    machine = ", ".join(
        f"{key.replace('_', ' ')} {hardware[key]}" for key in ("host", "device", "cores") if key in hardware
    )
    yield f'<p class="dim">{escape(machine)}; {escape(versions)}; commit {escape(str(header.get("git_commit")))}.</p>'


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files("disttrain.compare").joinpath(name).read_text()


def _plotly() -> str:
    """The whole of plotly.js, out of the installed package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
