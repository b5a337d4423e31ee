"""From plain numbers to the step, eval and summary records of a run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disttrain.metrics.ranks import RankReading, reduce_ranks
from disttrain.metrics.throughput import EXCLUDED, FlopsPerSequence, SteadyRates, Throughput, flop_rates, rates

TOKEN_LOSSES = ("lm", "mlm")


@dataclass(frozen=True)
class StepReading:
    """What the engine says of the step that is recorded, as plain numbers over the whole global batch."""

    step: int
    """Optimizer steps done, this one included."""
    losses: Mapping[str, float]
    """Mean of each objective: nats per target (lm, mlm) or per pair (nsp)."""
    learning_rate: float
    grad_norm: float | None = None
    """Global 2-norm before clipping."""
    gradient_clip_factor: float | None = None
    """What the gradient was multiplied with; None where nothing is clipped."""
    loss_scale: float | None = None
    """Loss scale of this step; None without one."""
    predicted_step_seconds: float | None = None
    """What a step was expected to take; None where nothing was expected."""
    ranks: Sequence[RankReading] = field(default_factory=tuple)
    """One reading of every rank."""


def perplexity(losses: Mapping[str, float]) -> float | None:
    """exp of the loss of the token objective (lm or mlm, nats per target); None without one, inf on overflow."""
    for name in TOKEN_LOSSES:
        if name in losses:
            try:
                return math.exp(losses[name])
            except OverflowError:
                return math.inf
    return None


class Metrics:
    """Keeps the totals of a run and makes its records. Lives on one rank; build it when training starts.

    `ranks` is the world size, `peak_flops_per_second` the dense peak of one rank's device in the run's precision,
    None when unknown. `clock` gives seconds. `bubble_theory` is the pipeline schedule's theoretical bubble, None
    without a pipeline.
    """

    def __init__(
        self,
        ranks: int,
        flops: FlopsPerSequence | None = None,
        peak_flops_per_second: float | None = None,
        warmup_steps: int = 3,
        clock: Callable[[], float] = time.perf_counter,
        bubble_theory: float | None = None,
    ):
        self.throughput = Throughput(clock, warmup_steps)
        self._bubble_theory = bubble_theory
        self._ranks = ranks
        self._flops = flops
        self._peak = peak_flops_per_second
        self._steady = SteadyRates()
        self._last: dict[str, Any] = {}
        self._last_eval: dict[str, Any] = {}
        self._best: tuple[float, int] | None = None
        self._joules: float | None = 0.0

    def step_record(self, reading: StepReading) -> dict[str, Any]:
        """The step record of every step since the last one. Raises ValueError when there was none."""
        interval = self.throughput.interval()
        timing = rates(interval, self._ranks)
        record = {
            "kind": "step",
            "step": reading.step,
            "tokens_seen": self.throughput.tokens_seen,
            "elapsed_seconds": self.throughput.elapsed_seconds,
            "train_seconds": self.throughput.train_seconds,
            **_losses(reading.losses, "loss"),
            "learning_rate": reading.learning_rate,
            "grad_norm": reading.grad_norm,
            "gradient_clip_factor": reading.gradient_clip_factor,
            "loss_scale": reading.loss_scale,
            "skipped_steps": self.throughput.skipped_steps,
            **timing,
            "predicted_step_seconds": reading.predicted_step_seconds,
            **flop_rates(timing, self._ranks, self._flops, self._peak),
            **reduce_ranks(reading.ranks or [RankReading(0)], interval.steps),
            **self._energy(reading.ranks, interval.tokens),
            "pipeline_bubble_fraction_theory": self._bubble_theory,
        }
        self._steady.add(record)
        self._last = record
        return record

    def _energy(self, ranks: Sequence[RankReading], tokens: int) -> dict[str, float | None]:
        """Energy of the interval, which is added to that of the run; unknown where that of one rank is."""
        known = [r.energy_joules for r in ranks if r.energy_joules is not None]
        joules = sum(known) if known and len(known) == len(ranks) else None
        self._joules = None if joules is None or self._joules is None else self._joules + joules
        return {"energy_joules": joules, "joules_per_token": None if joules is None or not tokens else joules / tokens}

    def eval_record(
        self,
        step: int,
        losses: Mapping[str, float],
        scores: Mapping[str, float] | None = None,
        sequences: int | None = None,
    ) -> dict[str, Any]:
        """The eval record of a held-out evaluation.

        `losses` are means like those of a step, `scores` further keys (mlm_accuracy, nsp_accuracy), `sequences` how
        many held-out sequences were used.
        """
        record = {
            "kind": "eval",
            "step": step,
            "tokens_seen": self.throughput.tokens_seen,
            "elapsed_seconds": self.throughput.elapsed_seconds,
            "train_seconds": self.throughput.train_seconds,
            **_losses(losses, "eval_loss"),
            "perplexity": perplexity(losses),
            **(scores or {}),
            "eval_sequences": sequences,
        }
        self._last_eval = record
        loss = record["eval_loss"]
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = (loss, step)
        return record

    @property
    def best_step(self) -> int | None:
        """Step of the lowest held-out loss so far."""
        return None if self._best is None else self._best[1]

    def summary_record(self, step: int, stop_reason: str) -> dict[str, Any]:
        """The summary record: totals of the run, averages and peaks of this process."""
        excluded = self.throughput.excluded_seconds
        kept = ("loss", "loss_scale", *(key for key in self._last if "bytes" in key or "bubble" in key))
        scores = {k: v for k, v in self._last_eval.items() if k not in ("kind", "step", "eval_sequences")}
        best_loss, best_step = self._best or (None, None)
        return {
            **{key: self._last.get(key) for key in kept},
            **scores,
            "kind": "summary",
            "step": step,
            "stop_reason": stop_reason,
            "tokens_seen": self.throughput.tokens_seen,
            "skipped_steps": self.throughput.skipped_steps,
            "elapsed_seconds": self.throughput.elapsed_seconds,
            "train_seconds": self.throughput.train_seconds,
            **{f"{kind}_seconds": excluded[kind] for kind in EXCLUDED},
            "best_eval_loss": best_loss,
            "best_eval_step": best_step,
            "energy_joules": self._joules if self._last else None,
            **self._steady.result(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers."""
        return {
            "best_eval": list(self._best) if self._best else None,
            "throughput": self.throughput.state_dict(),
            "energy_joules": self._joules,
        }

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Count again from a checkpoint that this process went back to (empty: from the beginning); time goes on."""
        best = state.get("best_eval")
        self._best = (float(best[0]), int(best[1])) if best else None
        self.throughput.roll_back(state.get("throughput", {}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the totals of an earlier process."""
        best = state["best_eval"]
        self._best = (float(best[0]), int(best[1])) if best else None
        self.throughput.load_state_dict(state["throughput"])
        self._joules = state.get("energy_joules")


def _losses(losses: Mapping[str, float], key: str) -> dict[str, float]:
    """The objective (sum of the means) under `key` and, when there are several, each mean under `key`_<name>."""
    if not losses:
        raise ValueError("a record needs the loss of at least one objective")
    terms = {f"{key}_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
    return {key: sum(losses.values()), **terms}
