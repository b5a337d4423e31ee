"""What a validation has found, as tables for a terminal and for docs/planner.md. No torch."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from disttrain.config.schema import Config
from disttrain.loggers.readable import count, step_time
from disttrain.planner.speeds import Speeds
from disttrain.planner.validation import REPEATS, STEPS, Trained, Validation

COLUMNS = ("layout", "predicted", "measured", "error", "spread", "MiB predicted", "MiB counted", "error")
BEGIN, END = "<!-- validation -->", "<!-- /validation -->"


def shown(validation: Validation) -> Group:
    """For a terminal."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for row in _rows(validation):
        table.add_row(*map(escape, row))
    return Group(table, "", *map(Text, _words(validation)))


def markdown(validation: Validation, config: Config, world: int, speeds: Speeds) -> str:
    """For a page."""
    model, data = config.model, config.data
    about = (
        f"{model.preset or model.family}, {model.layers} layers, {model.hidden_size} wide, "
        f"{config.train.global_batch_size} sequences of {data.sequence_length} tokens a step, {world} ranks on "
        f"{speeds.device} in {speeds.precision} ({speeds.source}). Steps of `disttrain train`, {STEPS} a run without the "
        f"first three, median of {REPEATS} runs that were made in turns; spread: of the runs; bytes of live tensors on the "
        "rank that holds most."
    )
    lines = [about, "", _line(COLUMNS), _line(["---", *["---:"] * (len(COLUMNS) - 1)])]
    lines += [_line(row) for row in _rows(validation)]
    return "\n".join([*lines, "", *(f"- {words}" for words in _words(validation)), ""])


def write(path: Path, text: str) -> None:
    """Between the page's marks for it, or as a file of its own."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN in page and END in page:
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        text = f"{before}{BEGIN}\n{text}{END}{after}"
    path.write_text(text, encoding="utf-8")


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(validation: Validation) -> Iterator[list[str]]:
    for one in validation.trained:
        yield _row(one)


def _row(one: Trained) -> list[str]:
    memory = one.predicted.memory
    predicted = step_time(one.predicted.step_seconds), f"{(memory.total - memory.runtime) / 2**20:.1f}"
    if one.failed is not None:
        return [one.predicted.layout.name, predicted[0], one.failed, "-", "-", predicted[1], "-", "-"]
    return [
        one.predicted.layout.name, predicted[0], step_time(one.seconds), f"{one.time_error:+.1%}", f"{one.spread:.1%}",
        predicted[1], f"{one.peak_bytes / 2**20:.1f}", f"{one.memory_error:+.1%}",
    ]  # fmt: skip


def _words(validation: Validation) -> Iterator[str]:
    """The errors in short."""
    good = validation.good
    yield (
        f"{len(validation.trained)} of {count(validation.legal)} layouts that fit: the planner's first choice, and a sample "
        f"drawn with seed {validation.seed}, half of it from the fastest quarter by prediction"
    )
    if not good:
        return
    for what, errors in (("step time", [abs(one.time_error) for one in good]),
                         ("memory", [abs(one.memory_error) for one in good])):  # fmt: skip
        yield f"{what}: off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most"
    if validation.regret is not None:
        yield f"regret of the planner's first choice: {validation.regret:.1%} over the fastest measured one"
    if validation.in_order is not None:
        yield f"{validation.in_order:.0%} of the pairs of layouts are in the order in which they were measured"
