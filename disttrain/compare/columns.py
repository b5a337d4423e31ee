"""What the tables of a comparison show: each column's name, how it is written, and what it means. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from disttrain.compare.comparison import Comparison, Measured
from disttrain.loggers import readable


@dataclass(frozen=True)
class Column:
    """One number of every strategy."""

    key: str
    """Its name in the CSV, with its unit."""
    title: str
    """Its heading."""
    meaning: str
    """What it is, for somebody who meets it for the first time."""
    show: Callable[[float | None], str]
    best: Literal["high", "low"] | None = None
    """Which end is the better one; None where neither is."""
    if_known: bool = False
    """Whether it is left out where no strategy has it."""


def _rate(value: float | None) -> str:
    return readable.count(value)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _flops(value: float | None) -> str:
    return "-" if value is None else readable.flops(value)


def _bytes(value: float | None) -> str:
    """As memory, with a digit more where it is little."""
    if value is None:
        return "-"
    return f"{value / readable.MIB:.2f} MiB" if 0 < value < 10 * readable.MIB else readable.size(value)


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


TABLES = ("Speed, memory and learning", "Communication and use of the hardware")
"""Where there is room for two tables, these are their titles."""


def columns(comparison: Comparison, table: str | None = None) -> list[Column]:
    """The columns of this comparison in order, or those of one of `TABLES`."""
    has = {key for s in comparison.strategies for key, value in s.values.items() if value is not None}
    parts = dict(zip(TABLES, (_main(comparison), _hardware()), strict=True))
    chosen = [column for name, part in parts.items() if table in (None, name) for column in part]
    return [column for column in chosen if not column.if_known or column.key in has]


def _main(comparison: Comparison) -> list[Column]:
    tokens, seconds = readable.count(comparison.equal_tokens), readable.duration(comparison.equal_seconds)
    memory = "reserved device memory" if comparison.on_device else "resident host memory, libraries included,"
    return [
        Column("ranks", "ranks", "processes that train together", _whole),
        Column("tokens_per_second", "tokens/s", "tokens trained on per second by all ranks together, after the first "
               "steps; median of the repeats", _rate, "high"),
        Column("tokens_per_second_min", "slowest", "tokens/s of the slowest repeat", _rate),
        Column("tokens_per_second_max", "fastest", "tokens/s of the fastest repeat", _rate),
        Column("ratio", f"x {comparison.baseline}", f"tokens/s divided by those of {comparison.baseline}", _times, "high"),
        Column("median_step_seconds", "step", "median time of an optimizer step", readable.step_time, "low"),
        Column("memory_bytes", "memory", f"most {memory} of one rank, the one with the most", readable.size, "low"),
        Column("loss_at_equal_tokens", f"loss at {tokens} tokens", f"training loss, nats, in the last tenth before {tokens} "
               "tokens, which every run has seen: who learns most from the same text", readable.loss, "low"),
        Column("loss_at_equal_seconds", f"loss after {seconds}", f"training loss, nats, in the last tenth before {seconds} "
               "in steps, which every run has trained: who learns most in the same time", readable.loss, "low"),
        Column("eval_loss", "held-out loss", "loss at the end of the run, nats, on text it was not trained on",
               readable.loss, "low"),
        Column("cost_per_million_tokens", f"{comparison.currency} per 1M tokens", "price of all ranks for as long as a "
               "million tokens take", _price, "low", if_known=True),
        Column("skipped_steps", "skipped", "updates left out because a gradient was no number", _whole),
        Column("repeats", "repeats", "runs that the medians are of", _whole),
    ]  # fmt: skip


def _hardware() -> list[Column]:
    return [
        Column("comm_bytes_per_step", "handed over", "bytes a step that the busiest rank hands to collectives",
               _bytes, "low"),
        Column("comm_bytes_uncompressed_per_step", "uncompressed", "the same, had no codec been used", _bytes),
        Column("wire_bytes_per_step", "on the wire", "estimate of the bytes a step that leave a rank, with rings",
               _bytes, "low"),
        Column("pipeline_bubble_fraction", "bubble", "share of the pipeline's time in which a rank computes nothing",
               readable.percent, "low", if_known=True),
        Column("pipeline_bubble_fraction_theory", "bubble in theory", "the same for equal stages, by formula",
               readable.percent, if_known=True),
        Column("model_flops_per_second_per_rank", "FLOP/s a rank", "arithmetic that the model needs, a second and rank",
               _flops, "high"),
        Column("mfu_causal", "MFU causal", "that as a share of the device's peak; - where the peak is not known",
               readable.percent, "high"),
        Column("mfu_full", "MFU full", "the same with attention counted over the whole square, as many papers do",
               readable.percent, "high"),
        Column("hfu", "HFU", "the same with what is really executed, recomputation included", readable.percent),
    ]  # fmt: skip


def best(column: Column, strategies: list[Measured]) -> str | None:
    """The best value of a column as it is shown; None where neither end is better, or all show the same."""
    known = [v for s in strategies if (v := s.values[column.key]) is not None and v == v]
    if column.best is None or len(set(map(column.show, known))) < 2:
        return None
    return column.show(max(known) if column.best == "high" else min(known))
