"""Where a run is and when it will end: what the console shows, without showing it."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from disttrain.config.checks import total_steps
from disttrain.config.schema import Config
from disttrain.loggers import readable

RECENT = 20
"""Step records whose mean step time predicts the time left."""

_STOPPED = {"steps": "all steps done", "time": "time is up", "target_loss": "target loss reached",
            "patience": "no better any more"}  # fmt: skip


class Progress:
    """The latest records of a run, and what follows from them."""

    def __init__(self, config: Config):
        self.total_steps = total_steps(config)
        self.step = 0
        self.latest: dict[str, Any] = {}
        """Last step record."""
        self.held_out: dict[str, Any] = {}
        """Last eval record."""
        self._seconds_limit = config.train.seconds
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def take(self, record: dict[str, Any]) -> None:
        """Take in a record of any kind."""
        if record["kind"] == "step":
            self.step, self.latest = record["step"], record
            if not record["warmup"] or not self._recent:
                self._recent.append((record["interval_steps"], record["step_seconds"]))
        elif record["kind"] == "eval":
            self.held_out = record
        elif record["kind"] == "header":
            self.step = record.get("resumed_step") or 0

    @property
    def fraction(self) -> float | None:
        """Share of the run that is done, by the limit that is nearest; None without a limit in steps or seconds."""
        shares = [self.step / self.total_steps] if self.total_steps else []
        if self._seconds_limit:
            shares.append(self.latest.get("train_seconds", 0.0) / self._seconds_limit)
        return min(max(shares), 1.0) if shares else None

    @property
    def seconds_left(self) -> float | None:
        """Time until the first limit, from recent step times; evaluations and checkpoints are not foreseen."""
        limits = []
        steps = sum(n for n, _ in self._recent)
        if self.total_steps and steps:
            step_seconds = sum(n * seconds for n, seconds in self._recent) / steps
            limits.append(max(self.total_steps - self.step, 0) * step_seconds)
        if self._seconds_limit and self.latest:
            limits.append(max(self._seconds_limit - self.latest["train_seconds"], 0.0))
        return min(limits, default=None)

    def at(self, step: int | None = None) -> str:
        """`step 120/500` of the present or a given step, padded so that lines stay aligned."""
        step = self.step if step is None else step
        if not self.total_steps:
            return f"step {step}"
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def state(self) -> Iterator[tuple[str, str]]:
        """(label, text) of what training is doing: loss and what drives it."""
        record = self.latest
        if not record:
            return
        yield "loss", readable.loss(record["loss"])
        yield "lr", f"{record['learning_rate']:.2e}".replace("e-0", "e-")
        if record["grad_norm"] is not None:
            yield "grad", f"{record['grad_norm']:.2f}"
        if record["loss_scale"] is not None:
            yield "scale", f"{record['loss_scale']:g}"

    def pace(self) -> Iterator[tuple[str, str]]:
        """(text, unit) of how fast it goes, the most important first."""
        record = self.latest
        if not record:
            return
        yield readable.count(record["tokens_per_second"]), "tokens/s"
        yield readable.step_time(record["step_seconds"]), "a step"
        if record.get("predicted_step_seconds") is not None:
            yield readable.step_time(record["predicted_step_seconds"]), "predicted"
        if record["mfu_causal"] is not None:
            yield readable.percent(record["mfu_causal"]), "MFU"

    def memory(self) -> str | None:
        """Memory of the worst rank: on the device where there is one, else of the host."""
        record = self.latest
        if record.get("peak_reserved_bytes_max") is not None:
            return f"{readable.size(record['peak_reserved_bytes_max'])} device"
        if record.get("host_rss_bytes_max") is not None:
            return f"{readable.size(record['host_rss_bytes_max'])} host"
        return None


def held_out_text(record: dict[str, Any]) -> str:
    """An eval record in one sentence."""
    parts = [f"held-out loss {readable.loss(record['eval_loss'])}"]
    if record.get("perplexity") is not None:
        parts.append(f"perplexity {readable.perplexity(record['perplexity'])}")
    parts += [f"{label} {value}" for label, value in readable.scores(record)]
    return ", ".join(parts)


def title(header: dict[str, Any]) -> str:
    """The header in one line: `gpt_tiny: gpt, 3.21M parameters, 4 ranks (tensor 2, shard 2), bf16`."""
    config = header.get("config") or {}
    ranks = header.get("world_size", 1)
    axes = [f"{axis} {n}" for axis, n in (header.get("mesh") or {}).items() if isinstance(n, int) and n > 1]
    parts = [
        (config.get("model") or {}).get("family"),
        f"{readable.count(header['parameters'])} parameters" if header.get("parameters") else None,
        f"{ranks} rank{'s' if ranks != 1 else ''}" + (f" ({', '.join(axes)})" if axes else ""),
        header.get("precision") or config.get("precision"),
    ]
    return f"{header.get('name') or 'run'}: {', '.join(part for part in parts if part)}"


def stopped(record: dict[str, Any]) -> str:
    """Why a run ended, from its summary record, in words."""
    reason = str(record["stop_reason"])
    return _STOPPED.get(reason, reason)


def farewell(record: dict[str, Any]) -> str:
    """The summary record in one line."""
    parts = [f"{stopped(record)} at step {record['step']}"]
    if record.get("loss") is not None:
        parts.append(f"loss {readable.loss(record['loss'])}")
    if record.get("eval_loss") is not None:
        parts.append(f"held-out {readable.loss(record['eval_loss'])}")
    if record.get("tokens_per_second_mean") is not None:
        parts.append(f"{readable.count(record['tokens_per_second_mean'])} tokens/s")
    parts.append(readable.duration(record.get("elapsed_seconds")))
    return ", ".join(parts)
