"""Clocks and rates of the training loop: plain arithmetic on an injected clock, no torch."""

import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXCLUDED = ("evaluation", "checkpoint", "logging", "choosing", "profiling")
"""Kinds of blocks that are no training."""


@dataclass(frozen=True)
class Interval:
    """What happened between two step records."""

    steps: int
    """Optimizer steps."""
    seconds: float
    """Time inside these steps, without the excluded blocks."""
    tokens: int
    """Tokens processed by all ranks, without padding."""
    target_tokens: int
    """Targets that were predicted, by all ranks: the denominator of the token loss."""
    padded_tokens: int
    """Padding positions processed by all ranks."""
    sequences: int
    """Sequences processed by all ranks."""
    warmup: bool
    """Whether any of the steps is a warm-up step of this process."""
    profiled: bool = False
    """Whether any of the steps was looked at by a profiler, which takes its time."""


@dataclass(frozen=True)
class FlopsPerSequence:
    """Floating-point operations (a multiply-add is two) of forward and backward of one full-length sequence."""

    causal: float
    """What the mathematics needs: attention counted over the positions each token may look at."""
    full: float
    """Attention counted over the whole square, as in PaLM (Chowdhery et al. 2022, appendix B)."""
    hardware: float
    """What is executed, recomputation included (Korthikanti et al. 2022, section 5)."""
    six_n: float
    """The rule of thumb 6 N a token (Hoffmann et al. 2022), N all parameters."""
    positions: int
    """Tokens of such a sequence."""


class Throughput:
    """Times steps, keeps what is no training out of them, and hands out one `Interval` per step record.

    The caller synchronises with the device before `end_step` of a recorded step and before an excluded block;
    the steps of an interval may otherwise run asynchronously, since only their sum is used.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, warmup_steps: int = 3):
        self.train_seconds = 0.0
        """Time inside steps, warm-up included."""
        self.tokens_seen = 0
        """Tokens of all steps, without padding."""
        self.skipped_steps = 0
        """Steps whose update was skipped because a gradient, or the loss, was no number."""
        self.excluded_seconds: dict[str, float] = {kind: 0.0 for kind in EXCLUDED}
        """Time of the excluded blocks by kind."""
        self._clock = clock
        self._warmup_left = warmup_steps
        self._earlier = 0.0
        self._started: float | None = None
        self._paused: list[str] = []
        self._mark = 0.0
        self._step_began: float | None = None
        self._counts = self._zero()

    def start(self) -> None:
        """Start the clock of `elapsed_seconds`; otherwise the first step does."""
        if self._started is None:
            self._started = self._clock()

    def begin_step(self) -> None:
        """A step begins: before its batch is asked for, so that waiting for data counts."""
        if self._step_began is not None or self._paused:
            raise RuntimeError("begin_step inside another step or an excluded block")
        self.start()
        self._step_began = self._clock() - sum(self.excluded_seconds.values())

    def end_step(
        self, tokens: int, target_tokens: int, padded_tokens: int = 0, sequences: int = 0, skipped: bool = False,
        profiled: bool = False,
    ) -> float:  # fmt: skip
        """The step ended; returns its seconds.

        The counts are of all ranks, and of this step or of every step since counts were last given (a loop that
        reads the device only every `log.every` steps gives zeros in between).
        """
        if self._step_began is None or self._paused:
            raise RuntimeError("end_step without begin_step, or inside an excluded block")
        seconds = self._clock() - sum(self.excluded_seconds.values()) - self._step_began
        self._step_began = None
        self.train_seconds += seconds
        self.tokens_seen += tokens
        self.skipped_steps += int(skipped)
        counts = self._counts
        counts["seconds"] += seconds
        given = {"tokens": tokens, "target_tokens": target_tokens, "padded_tokens": padded_tokens}
        for name, count in {"steps": 1, **given, "sequences": sequences}.items():
            counts[name] += count
        counts["warmup"] = counts["warmup"] or self._warmup_left > 0
        counts["profiled"] = counts["profiled"] or profiled
        self._warmup_left = max(self._warmup_left - 1, 0)
        return seconds

    def pause(self, kind: str) -> None:
        """Begin a block that is no training, one of `EXCLUDED`; nested blocks count as the inner."""
        if kind not in EXCLUDED:
            raise ValueError(f"{kind!r} is not one of {', '.join(EXCLUDED)}")
        now = self._clock()
        if self._paused:
            self._charge(now)
        self._paused.append(kind)
        self._mark = now

    def resume(self) -> None:
        """End the innermost excluded block."""
        if not self._paused:
            raise RuntimeError("resume without pause")
        self._charge(self._clock())
        self._paused.pop()

    @contextmanager
    def excluded(self, kind: str) -> Iterator[None]:
        """`pause` and `resume` around a block, also when it raises."""
        self.pause(kind)
        try:
            yield
        finally:
            self.resume()

    @property
    def elapsed_seconds(self) -> float:
        """Wall time since `start`, everything included, plus that of the earlier processes of the run."""
        return self._earlier + (0.0 if self._started is None else self._clock() - self._started)

    def interval(self) -> Interval:
        """What happened since the last call."""
        interval = Interval(**self._counts)
        self._counts = self._zero()
        return interval

    def state_dict(self) -> dict[str, Any]:
        """Totals so far, for a checkpoint: plain numbers."""
        return {
            "elapsed_seconds": self.elapsed_seconds,
            "train_seconds": self.train_seconds,
            "excluded_seconds": dict(self.excluded_seconds),
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
        }

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Count tokens and skipped steps again from a checkpoint; what was done since took its time all the same."""
        self.tokens_seen = int(state.get("tokens_seen", 0))
        self.skipped_steps = int(state.get("skipped_steps", 0))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier process; its warm-up does not spare ours."""
        self._earlier = float(state["elapsed_seconds"])
        self.train_seconds = float(state["train_seconds"])
        self.excluded_seconds = {kind: float(state["excluded_seconds"].get(kind, 0.0)) for kind in EXCLUDED}
        self.tokens_seen = int(state["tokens_seen"])
        self.skipped_steps = int(state["skipped_steps"])

    def _charge(self, now: float) -> None:
        kind = self._paused[-1]
        self.excluded_seconds[kind] += now - self._mark
        self._mark = now

    @staticmethod
    def _zero() -> dict[str, Any]:
        counts = dict.fromkeys(("steps", "tokens", "target_tokens", "padded_tokens", "sequences"), 0)
        return {**counts, "seconds": 0.0, "warmup": False, "profiled": False}


def rates(interval: Interval, ranks: int) -> dict[str, Any]:
    """Times and rates of an interval, as keys of a step record; null where no time passed."""
    steps, seconds = interval.steps, interval.seconds
    if steps == 0:
        raise ValueError("a step record needs at least one step since the last record")

    def per_second(count: float) -> float | None:
        return count / seconds if seconds > 0 else None

    return {
        "interval_steps": steps,
        "warmup": interval.warmup,
        "profiled": interval.profiled,
        "step_seconds": seconds / steps,
        "tokens_per_second": per_second(interval.tokens),
        "tokens_per_second_per_rank": per_second(interval.tokens / ranks),
        "sequences_per_second": per_second(interval.sequences),
        "target_tokens": interval.target_tokens / steps,
        "padded_tokens": interval.padded_tokens / steps,
    }


def flop_rates(
    timing: Mapping[str, float | None], ranks: int, flops: FlopsPerSequence | None, peak_flops: float | None
) -> dict[str, float | None]:
    """FLOP/s of a rank and the share of its peak (FLOP/s of one rank's device); null for what is not known.

    `timing` holds tokens_per_second, without padding, which what the model needs is counted for, and sequences_per_second,
    for what is executed.
    """
    names = ("model_flops_per_second_per_rank", "mfu_six_n", "mfu_causal", "mfu_full", "hfu")
    tokens, sequences = timing["tokens_per_second"], timing["sequences_per_second"]
    if flops is None or tokens is None or sequences is None:
        return dict.fromkeys(names)
    useful = [
        count / flops.positions * tokens / ranks for count in (flops.causal, flops.six_n, flops.causal, flops.full)
    ]
    executed = flops.hardware * sequences / ranks
    shares = [reached / peak_flops if peak_flops else None for reached in (*useful[1:], executed)]
    return dict(zip(names, [useful[0], *shares], strict=True))


class SteadyRates:
    """Averages over the step records that hold no warm-up step and no profiled one; the same formulas live and in a report.

    A rate r of records lasting t seconds averages to sum(r t) / sum(t): total work over total time. Memory: eight
    bytes a record.
    """

    RATES = (
        "tokens_per_second",
        "tokens_per_second_per_rank",
        "sequences_per_second",
        "model_flops_per_second_per_rank",
        "mfu_six_n",
        "mfu_causal",
        "mfu_full",
        "hfu",
    )

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._step_seconds = array("d")
        self._work = dict.fromkeys(self.RATES, 0.0)
        self._unknown: set[str] = set()
        self._joules: float | None = 0.0
        self._tokens = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a step record."""
        if record["warmup"] or record.get("profiled"):
            return
        seconds = record["step_seconds"] * record["interval_steps"]
        self.steps += record["interval_steps"]
        self.seconds += seconds
        self._step_seconds.append(record["step_seconds"])
        for name in self.RATES:
            rate = record.get(name)
            if rate is None:
                self._unknown.add(name)
            else:
                self._work[name] += rate * seconds
        joules = record.get("energy_joules")
        self._joules = None if joules is None or self._joules is None else self._joules + joules
        self._tokens += (record.get("tokens_per_second") or 0.0) * seconds

    def result(self) -> dict[str, Any]:
        """Keys of a summary record; null where no step counts, or the rate was unknown at any time."""
        steps, seconds = self.steps, self.seconds
        means = {
            f"{name}_mean": None if name in self._unknown or seconds <= 0 else work / seconds
            for name, work in self._work.items()
        }
        return {
            "measured_steps": steps,
            "mean_step_seconds": seconds / steps if steps else None,
            "median_step_seconds": statistics.median(self._step_seconds) if steps else None,
            **means,
            "joules_per_token_mean": self._joules / self._tokens if self._joules is not None and self._tokens else None,
        }
