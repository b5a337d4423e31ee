"""Judges what was recorded of a step: spikes of the loss, numbers that are none, slow ranks (docs/faults.md). No torch.

Every rank has a `Watch` and gives it the same numbers, so that all come to the same decision.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from disttrain.config.watching import WatchConfig
from disttrain.metrics import RankReading

FEWEST = 20
"""Losses that must have been recorded before one is judged."""
GAUSSIAN = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation."""
SMALLEST = 1e-3
"""A deviation counts as at least this share of the median."""
COMPARED_STEPS, SLOW_IN_A_ROW = 10, 3
"""Over how many steps ranks are compared, and how many times in a row one must be slow to be called so."""
NOTICEABLE = 0.1
"""Others must lose at least this share of a step by a rank."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a number, or the loss has spiked, and training is not to go on."""


@dataclass(frozen=True)
class Finding:
    """Something to write down as an event, and what is to be done about it."""

    event: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    action: Literal["go_on", "rollback", "stop"] = "go_on"


class Watch:
    """What is remembered of earlier records and rollbacks."""

    def __init__(self, config: WatchConfig):
        self._config = config
        self.left_out = 0
        """Batches that rollbacks have left out: how far the position in the data is ahead of the steps."""
        self._rollbacks = self._skips = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._spiking = False
        self._own: dict[int, tuple[float, float]] = {}
        """Seconds each rank waited for data and computed by itself since ranks were last compared."""
        self._compared_steps, self._compared_seconds = 0, 0.0
        self._slow_for: dict[int, int] = {}
        """In how many comparisons in a row a rank was slow."""

    def position(self, step: int) -> int:
        """Which batch of the data comes after `step` steps."""
        return step + self.left_out

    def skip(self, step: int, skipped: bool) -> Finding | None:
        """Take in whether a step's update was left out, of every step."""
        if self._config.on_nonfinite != "skip" or not skipped:
            self._skips = 0
            return None
        self._skips += 1
        message = f"the loss or the gradient is no number: the update of step {step} is skipped, {self._skips} in a row"
        action = "stop" if self._skips > self._config.max_skips else "go_on"
        return Finding("update_skipped", message, {"in_a_row": self._skips}, action)

    def judge(self, step: int, loss: float, grad_norm: float, skipped: bool) -> Finding | None:
        """Judge a recorded loss (nats) and gradient norm; `skipped`: the step's update was left out."""
        if skipped and self._config.on_nonfinite == "skip":
            return None
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or skipped):
            message = f"the loss is {loss} and the gradient norm {grad_norm} at step {step}"
            return self._answer(
                "not_finite", message, {"loss": loss, "grad_norm": grad_norm}, self._config.on_nonfinite
            )
        spike = self._spike(loss)
        self._losses.append(loss)
        before, self._spiking = self._spiking, spike is not None
        if spike is None or before:
            return None
        middle, z = spike
        message = f"the loss spiked to {loss:.4g} at step {step}, {z:.1f} deviations above the median {middle:.4g}"
        return self._answer("loss_spike", message, {"loss": loss, "median": middle, "z": z}, self._config.on_spike)

    def _spike(self, loss: float) -> tuple[float, float] | None:
        """Median of the window and how many deviations above it a loss is; None where that is no spike."""
        if self._config.loss_z is None or len(self._losses) < FEWEST:
            return None
        middle = median(self._losses)
        deviation = GAUSSIAN * median(abs(earlier - middle) for earlier in self._losses)
        z = (loss - middle) / max(deviation, SMALLEST * abs(middle), 1e-12)
        return (middle, z) if z > self._config.loss_z else None

    def _answer(self, event: str, message: str, details: dict[str, Any], policy: str) -> Finding:
        if policy == "rollback" and self._rollbacks >= self._config.max_rollbacks:
            return Finding(event, f"{message}, after {self._rollbacks} rollbacks", details, "stop")
        return Finding(event, message, details, "rollback" if policy == "rollback" else
                       "go_on" if policy == "event" else "stop")  # fmt: skip

    def roll_back(self, step: int, to: int, saved: Mapping[str, Any], batch_tokens: int) -> Finding:
        """Go back from `step` to the checkpoint of step `to`, which `saved` this watch's state: batches it had not seen,
        up to that of `step`, are left out. `batch_tokens`: tokens of a batch, padding included."""
        first, after, rollbacks = to + saved.get("left_out", 0), self.position(step), self._rollbacks + 1
        self.load_state_dict(saved)
        self.left_out, self._rollbacks = after - to, rollbacks
        message = (
            f"rolled back from step {step} to step {to}: batches {first} to {after - 1} of the data are left out "
            f"({(after - first) * batch_tokens} tokens), rollback {rollbacks} of at most {self._config.max_rollbacks}"
        )
        details = {"from_step": step, "to_step": to, "first_batch": first, "last_batch": after - 1,
                   "batches": after - first, "tokens": (after - first) * batch_tokens, "rollbacks": rollbacks}  # fmt: skip
        return Finding("rolled_back", message, details)

    def slow_ranks(self, readings: Sequence[RankReading], interval: Mapping[str, Any]) -> list[Finding]:
        """Compare ranks over at least COMPARED_STEPS steps that count in averages; which have become slow, each told once.
        `interval` is the step record of the readings."""
        if self._config.slow_rank is None or interval["warmup"] or interval.get("profiled"):
            return []
        for r in readings:
            data, compute = self._own.get(r.rank, (0.0, 0.0))
            self._own[r.rank] = data + r.data_seconds, compute + (r.compute_seconds or 0.0)
        self._compared_steps += interval["interval_steps"]
        self._compared_seconds += interval["interval_steps"] * interval["step_seconds"]
        if self._compared_steps < COMPARED_STEPS:
            return []
        found = {r.rank: slow for r in readings if (slow := self._slow(r, readings, self._config.slow_rank))}
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in found}
        self._own, self._compared_steps, self._compared_seconds = {}, 0, 0.0
        return [slow for rank, slow in found.items() if self._slow_for[rank] == SLOW_IN_A_ROW]

    def _slow(self, rank: RankReading, readings: Sequence[RankReading], most: float) -> Finding | None:
        """Whether a rank takes longer than the median of the others that have the same stage."""
        peers = [self._own[r.rank] for r in readings if r.stage == rank.stage and r.rank != rank.rank]
        if not peers:
            return None
        mine, steps = self._own[rank.rank], self._compared_steps
        own, usual = sum(mine), median(map(sum, peers))
        if own <= most * usual or own - usual < NOTICEABLE * self._compared_seconds:
            return None
        data, compute = (mine[kind] - median(peer[kind] for peer in peers) for kind in (0, 1))
        cause, factor = "data" if data > compute else "compute", own / usual if usual > 0 else None
        message = (
            f"rank {rank.rank} on {rank.host} is slow: {own / steps:.3g} s a step by itself, its peers "
            f"{usual / steps:.3g} s; most of the difference is {'waiting for data' if cause == 'data' else 'computing'}"
        )
        details = {"rank": rank.rank, "host": rank.host, "factor": factor, "own_seconds": own / steps,
                   "peers_seconds": usual / steps, "cause": cause, "steps": steps}  # fmt: skip
        return Finding("slow_rank", message, details)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers."""
        return {"left_out": self.left_out, "rollbacks": self._rollbacks, "skips": self._skips,
                "losses": list(self._losses), "spiking": self._spiking}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; from the beginning where it is empty."""
        self.left_out, self._rollbacks = state.get("left_out", 0), state.get("rollbacks", 0)
        self._skips, self._spiking = state.get("skips", 0), state.get("spiking", False)
        self._losses = deque(state.get("losses", []), maxlen=self._config.window)
