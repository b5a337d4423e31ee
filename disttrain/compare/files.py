"""The comparison as Markdown and as CSV. Imports no torch."""

import csv
import io
from collections.abc import Iterator

from disttrain.compare.columns import TABLES, columns
from disttrain.compare.comparison import Comparison
from disttrain.compare.sentences import caveats, findings, glossary, subject


def markdown(comparison: Comparison) -> str:
    """The report without its plots."""
    return "\n".join(_markdown(comparison)) + "\n"


def _markdown(comparison: Comparison) -> Iterator[str]:
    yield f"# Comparison: {comparison.name}\n\n{subject(comparison)}.\n"
    yield from (f"- {text}" for text in findings(comparison))
    yield "\nTo keep in mind:\n"
    yield from (f"- {text}" for text in caveats(comparison))
    yield "\n![Throughput, memory and loss](report.png)\n"
    yield "A star is on the Pareto front of throughput and memory.\n"
    for title in TABLES:
        shown = columns(comparison, title)
        yield f"## {title}\n\n| strategy | {' | '.join(c.title for c in shown)} |\n| --- |{' ---: |' * len(shown)}"
        for s in comparison.strategies:
            star = " \N{BLACK STAR}" if s.name in comparison.front else ""
            yield f"| {s.name}{star} | {' | '.join(c.show(s.values[c.key]) for c in shown)} |"
        yield ""
    if comparison.not_run:
        yield "## What could not run, and why\n\n| strategy | what became of it | why |\n| --- | --- | --- |"
        yield from (f"| {n.name} | {n.state} | {_cell(n.reason)} |" for n in comparison.not_run)
        yield ""
    yield "## What the strategies are\n\n| strategy | what it is | settings of its own |\n| --- | --- | --- |"
    for s in comparison.strategies:
        words = " ".join(s.group.settings)
        yield f"| {s.name} | {_cell(s.group.about or '-')} | {f'`{_cell(words)}`' if words else '-'} |"
    yield "\n## What the columns mean\n"
    yield from (f"- **{title}**: {meaning}" for title, meaning in glossary(comparison))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def strategies_csv(comparison: Comparison) -> str:
    """A line a strategy: every number, unrounded, and its settings. Memory is in bytes, times in seconds."""
    rows = [{"strategy": s.name, "pareto_front": int(s.name in comparison.front), **s.values,
             "settings": " ".join(s.group.settings)} for s in comparison.strategies]  # fmt: skip
    return _csv(rows)


def runs_csv(comparison: Comparison) -> str:
    """A line a run."""
    rows = [
        {"strategy": s.name, "run": run.name, **values}
        for s in comparison.strategies
        for run, values in zip(s.group.runs, s.each, strict=True)
    ]
    return _csv(rows)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
