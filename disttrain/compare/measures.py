"""What one run came to, from its records: the numbers that are compared. Formulas in docs/measurement.md. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from disttrain.metrics import SteadyRates
from disttrain.report import Run

Values = dict[str, float | None]

LAST_SHARE = 0.1
"""A loss at so many tokens or seconds is the mean of the records in the tenth before that point, if there are any."""


@dataclass(frozen=True)
class Curve:
    """Training loss of the step records of a run, in order."""

    tokens: list[int]
    """Tokens seen."""
    seconds: list[float]
    """Time inside steps."""
    loss: list[float]
    """Nats."""


def curve(run: Run) -> Curve:
    """The training loss of a run."""
    return Curve([r["tokens_seen"] for r in run.steps], [r["train_seconds"] for r in run.steps],
                 [r["loss"] for r in run.steps])  # fmt: skip


def loss_at(points: Sequence[float], losses: Sequence[float], end: float) -> float | None:
    """Mean of the losses at points in (0.9 end, end], or the last loss before them; None where there is none either.

    `points` rise.
    """
    until = [(point, loss) for point, loss in zip(points, losses, strict=True) if point <= end]
    inside = [loss for point, loss in until if point > (1 - LAST_SHARE) * end] or [loss for _, loss in until[-1:]]
    return sum(inside) / len(inside) if inside else None


def measure(run: Run) -> Values:
    """Numbers of one run that need no other run; None for what it has not recorded."""
    steady = SteadyRates()
    for record in run.steps:
        steady.add(record)
    rates = steady.result()
    summary = run.summary or {}
    bubbles = [r["pipeline_bubble_fraction"] for r in run.steps if r.get("pipeline_bubble_fraction") is not None]
    last = run.steps[-1]
    return {
        "ranks": run.header.get("world_size", 1),
        "tokens_per_second": rates["tokens_per_second_mean"],
        "tokens_per_second_per_rank": rates["tokens_per_second_per_rank_mean"],
        "median_step_seconds": rates["median_step_seconds"],
        "device_bytes": _most(run, "peak_reserved_bytes_max"),
        "host_bytes": _most(run, "host_rss_bytes_max"),
        "eval_loss": run.evals[-1]["eval_loss"] if run.evals else None,
        "comm_bytes_per_step": _mean(run, "comm_bytes_per_step"),
        "comm_bytes_uncompressed_per_step": _mean(run, "comm_bytes_uncompressed_per_step"),
        "wire_bytes_per_step": _mean(run, "wire_bytes_per_step"),
        "pipeline_bubble_fraction": median(bubbles) if bubbles else None,
        "pipeline_bubble_fraction_theory": last.get("pipeline_bubble_fraction_theory"),
        "model_flops_per_second_per_rank": rates["model_flops_per_second_per_rank_mean"],
        "mfu_causal": rates["mfu_causal_mean"],
        "mfu_full": rates["mfu_full_mean"],
        "hfu": rates["hfu_mean"],
        "skipped_steps": last.get("skipped_steps"),
        "steps": last["step"],
        "tokens_seen": last["tokens_seen"],
        "measured_steps": rates["measured_steps"],
        "train_seconds": last["train_seconds"],
        "elapsed_seconds": summary.get("elapsed_seconds", last["elapsed_seconds"]),
    }


def cost_per_million_tokens(
    price_per_rank_hour: float | None, ranks: float | None, tokens_per_second: float | None
) -> float | None:
    """Price of the ranks for as long as a million tokens take in steps; None where something is not known."""
    if price_per_rank_hour is None or ranks is None or not tokens_per_second:
        return None
    return price_per_rank_hour * ranks / 3600 * 1e6 / tokens_per_second


def middle(values: Sequence[float | None]) -> float | None:
    """The median of repeats; None where one of them is not known, nan where one is no number."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return median(known) if all(map(math.isfinite, known)) else math.nan


def _most(run: Run, key: str) -> float | None:
    values: list[Any] = [r[key] for r in run.steps if r.get(key) is not None]
    return max(values, default=None)


def _mean(run: Run, key: str) -> float | None:
    """A figure per step, averaged over all steps of the run: local steps send in some of them only."""
    if any(r.get(key) is None for r in run.steps):
        return None
    return sum(r[key] * r["interval_steps"] for r in run.steps) / sum(r["interval_steps"] for r in run.steps)
