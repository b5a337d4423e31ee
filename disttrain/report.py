"""What one run did, from its folder alone: loss curve and table. Reads metrics.jsonl, imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from disttrain.loggers import readable
from disttrain.loggers.jsonl import FILE, read_records
from disttrain.loggers.progress import stopped
from disttrain.metrics import SteadyRates

Record = dict[str, Any]

NO_AVERAGE = "- (every step was a warm-up or profiled step)"
SMOOTHING_SHARE = 50
"""The smoothed loss is a running mean over 1/50 of the records on each side."""


@dataclass(frozen=True)
class Run:
    """The records of a run by kind, each in the order of writing."""

    folder: Path
    headers: list[Record]
    """One for every process start."""
    steps: list[Record]
    evals: list[Record]
    events: list[Record]
    summaries: list[Record]

    @property
    def header(self) -> Record:
        """Header of the newest process; empty without one."""
        return self.headers[-1] if self.headers else {}

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.header.get("name") or self.folder.resolve().name

    @property
    def summary(self) -> Record | None:
        """The last summary, unless steps were recorded after it (a finished run that was continued)."""
        if not self.summaries:
            return None
        last = self.summaries[-1]
        return last if not self.steps or self.steps[-1]["step"] <= last["step"] else None


def read_run(run_dir: Path) -> Run:
    """Read a run folder; a half-written last line, as of a run that is going on or was killed, is left out.

    Raises RefusedInput when there is no metrics.jsonl or another line of it is broken.
    """
    folder = Path(run_dir)
    kinds: dict[str, list[Record]] = {"header": [], "step": [], "eval": [], "event": [], "summary": []}
    for record in read_records(folder / FILE):
        kinds.setdefault(record["kind"], []).append(record)
        if record.get("event") == "rolled_back":  # what came after the step it went back to is not of the run any more
            for kind in ("step", "eval"):
                kinds[kind] = [made for made in kinds[kind] if made["step"] <= record["details"]["to_step"]]
    return Run(folder, kinds["header"], kinds["step"], kinds["eval"], kinds["event"], kinds["summary"])


def loss_curve(run: Run, path_png: Path, references: Mapping[str, float] | None = None) -> None:
    """Draw `loss_figure` into a PNG of 1200 x 750 pixels, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(loss_figure(run, references))
    Path(path_png).parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path_png)  # savefig draws twice


def loss_figure(run: Run, references: Mapping[str, float] | None = None) -> Any:
    """matplotlib figure of training loss (every record, and smoothed) and held-out loss against tokens seen.

    `references` are horizontal lines: label to nats. Records whose loss is not finite leave a gap. Raises ValueError
    when no step has a finite loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    points = [(r["tokens_seen"], r["step"], r["loss"]) for r in run.steps]
    finite = [loss for _, _, loss in points if math.isfinite(loss)]
    if not finite:
        raise ValueError(f"{run.folder / FILE} holds no step with a finite loss")
    tokens, steps, losses = (list(column) for column in zip(*points, strict=True))
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9bb8d3", linewidth=0.8, label="training, each record")
    axes.plot(tokens, _running_mean(losses), color="#1f5a94", linewidth=2.0, label="training, smoothed")
    held_out = [(r["tokens_seen"], r["eval_loss"]) for r in run.evals if math.isfinite(r["eval_loss"])]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c8502d", linewidth=1.2, markersize=5, label="held-out")
    for i, (label, nats) in enumerate((references or {}).items()):
        style = ("--", "-.", ":")[i % 3]
        axes.axhline(nats, color="#555555", linewidth=1.0, linestyle=style, label=f"{label}: {nats:.3f}")
    axes.set_xlim(0, tokens[-1] * 1.02)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(f"loss, nats per {_target(run)}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable.count(value)))
    axes.grid(alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False)
    _step_axis(axes, tokens, steps)
    figure.suptitle(f"{run.name}: {_last_losses(run)} at the end", fontsize=11)
    return figure


def summary_table(run: Run) -> Table:
    """What a run came to, in one table of two columns. Raises ValueError when no step was recorded."""
    if not run.steps:
        raise ValueError(f"{run.folder / FILE} holds no step")
    last = run.steps[-1]
    table = Table(title=run.name, show_header=False, title_style="bold", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(run, last):
        table.add_row(label, text)
    return table


def _rows(run: Run, last: Record) -> list[tuple[str, str]]:
    steady = SteadyRates()
    for record in run.steps:
        steady.add(record)
    rates = steady.result()
    summary = run.summary
    rows = [
        ("state", _state(run, summary, last)),
        ("training loss", f"{readable.loss(last['loss'])} nats at step {last['step']}{_smoothed(run)}"),
        *_held_out_rows(run),
        ("tokens seen", f"{readable.count(last['tokens_seen'])} in {last['step']} steps"),
        ("time", _time(summary or last)),
        ("tokens per second", _rate(rates, "tokens_per_second", "tokens_per_second_per_rank", run)),
        ("step time", _step_time(rates, last)),
        ("MFU", _mfu(run, rates)),
        *_energy_row(run, summary, rates),
        *_bubble_row(run, last),
        ("memory, worst rank", _memory(last)),
    ]
    if last.get("skipped_steps"):
        why = "gradient or loss no number" if last.get("loss_scale", 1.0) is None else "gradient overflow"
        rows.append(("skipped updates", f"{last['skipped_steps']} of {last['step']} ({why})"))
    rows += _watched(run)
    failed = sorted({event["details"]["sink"] for event in run.events if event["event"] == "sink_failed"})
    if failed:
        rows.append(("failed sinks", ", ".join(failed)))
    return [*rows, ("checkpoints", _checkpoints(run)), ("metrics", str(run.folder / FILE))]


def _watched(run: Run) -> list[tuple[str, str]]:
    """What `watch` has found; resumed steps may have found it again."""
    rows = []
    for name, label in (("not_finite", "no number"), ("loss_spike", "loss spikes")):
        if steps := sorted({event["step"] for event in run.events if event["event"] == name}):
            rows.append((label, "at step " + ", ".join(map(str, steps))))
    for d in (event["details"] for event in run.events if event["event"] == "rolled_back"):
        left_out = f"batches {d['first_batch']} to {d['last_batch']} left out"
        rows.append(("rolled back", f"from step {d['from_step']} to {d['to_step']}, {left_out}"))
    if slow := sorted({(e["details"]["rank"], e["details"]["host"]) for e in run.events if e["event"] == "slow_rank"}):
        rows.append(("slow ranks", ", ".join(f"{rank} on {host}" for rank, host in slow)))
    return rows


def _state(run: Run, summary: Record | None, last: Record) -> str:
    starts = f", {len(run.headers)} process starts" if len(run.headers) > 1 else ""
    if summary is not None:
        return f"ended, {stopped(summary)}{starts}"
    return f"no summary after step {last['step']}: running, or it was killed{starts}"


def _smoothed(run: Run) -> str:
    losses = [record["loss"] for record in run.steps]
    if len(losses) < 20:
        return ""
    tail = losses[-(len(losses) // 10) :]
    return f" (mean of the last {len(tail)} records {readable.loss(sum(tail) / len(tail))})"


def _held_out_rows(run: Run) -> list[tuple[str, str]]:
    if not run.evals:
        return [("held-out loss", "- (not evaluated)")]
    last = run.evals[-1]
    best = min(run.evals, key=lambda record: record["eval_loss"] if math.isfinite(record["eval_loss"]) else math.inf)
    note = "" if best is last else f" (best {readable.loss(best['eval_loss'])} at step {best['step']})"
    rows = [("held-out loss", f"{readable.loss(last['eval_loss'])} nats at step {last['step']}{note}")]
    if last.get("perplexity") is not None:
        rows.append(("held-out perplexity", readable.perplexity(last["perplexity"])))
    return [*rows, *readable.scores(last)]


def _time(record: Record) -> str:
    text = (
        f"{readable.duration(record['elapsed_seconds'])}, of it {readable.duration(record['train_seconds'])} in steps"
    )
    for kind in ("evaluation", "checkpoint", "choosing"):
        if record.get(f"{kind}_seconds"):
            text += f", {readable.duration(record[f'{kind}_seconds'])} {kind}"
    return text


def _rate(rates: Record, key: str, per_rank: str, run: Run) -> str:
    total = rates[f"{key}_mean"]
    if total is None:
        return NO_AVERAGE
    ranks = run.header.get("world_size", 1)
    each = f" ({readable.count(rates[f'{per_rank}_mean'])} a rank on {ranks} ranks)" if ranks > 1 else ""
    return f"{readable.count(total)}{each}, mean of {rates['measured_steps']} steps after warm-up"


def _step_time(rates: Record, last: Record) -> str:
    if rates["median_step_seconds"] is None:
        return NO_AVERAGE
    median, mean = rates["median_step_seconds"], rates["mean_step_seconds"]
    predicted = last.get("predicted_step_seconds")
    expected = f", predicted by compression.codec=auto {readable.step_time(predicted)}" if predicted else ""
    return f"median {readable.step_time(median)}, mean {readable.step_time(mean)}{expected}"


def _mfu(run: Run, rates: Record) -> str:
    source = run.header.get("peak_flops_source") or "peak FLOP/s of this device unknown"
    if rates["mfu_causal_mean"] is not None:
        shares = ("mfu_six_n_mean", "6N"), ("mfu_causal_mean", "causal"), ("mfu_full_mean", "full attention")
        text = ", ".join(f"{readable.percent(rates[key])} {label}" for key, label in shares if rates[key] is not None)
        peak = run.header.get("peak_flops_per_second")
        of = f"; of {readable.flops(peak)}, {source}" if peak else ""
        return f"{text}; HFU {readable.percent(rates['hfu_mean'])}{of}"
    if rates["measured_steps"] == 0:
        return NO_AVERAGE
    return f"- ({source}{_reached(run, rates)})"


def _reached(run: Run, rates: Record) -> str:
    """FLOP/s of a rank by every convention that the header knows; they need no peak."""
    causal, model = rates["model_flops_per_second_per_rank_mean"], run.header.get("flops_causal_per_sequence")
    if causal is None:
        return ""
    if not model:
        return f"; {readable.flops(causal)} a rank"
    sequences = (rates["sequences_per_second_mean"] or 0.0) / run.header.get("world_size", 1)
    found: dict[str, float] = {}
    for name, label in (("six_n", "6N"), ("causal", "causal"), ("full", "full attention")):
        if flops := run.header.get(f"flops_{name}_per_sequence"):
            found[label] = causal * flops / model
    if flops := run.header.get("flops_hardware_per_sequence"):
        found["executed"] = sequences * flops
    return "; a rank " + ", ".join(f"{readable.flops(value)} {label}" for label, value in found.items())


def _energy_row(run: Run, summary: Record | None, rates: Record) -> list[tuple[str, str]]:
    """Energy of the run and of a token; why there is none, where the header says."""
    source = run.header.get("energy_source")
    if not source:
        return []
    each = rates["joules_per_token_mean"]
    if each is None:
        return [("energy", f"- ({source})")]
    joules = (summary or {}).get("energy_joules")
    total = "" if joules is None else f"{readable.joules(joules)}, "
    return [("energy", f"{total}{readable.joules(each)} a token ({source})")]


def _bubble_row(run: Run, last: Record) -> list[tuple[str, str]]:
    measured = [share for record in run.steps if (share := record.get("pipeline_bubble_fraction")) is not None]
    if not measured:
        return []
    theory = last.get("pipeline_bubble_fraction_theory")
    beside = "" if theory is None else f", {readable.percent(theory)} in theory"
    return [("pipeline bubble", f"median {readable.percent(median(measured))} measured{beside}")]


def _memory(last: Record) -> str:
    parts = []
    for key, label in (("peak_allocated_bytes", "allocated"), ("peak_reserved_bytes", "reserved")):
        if last.get(f"{key}_max") is not None:
            parts.append(f"{readable.size(last[f'{key}_max'])} {label} (rank {last[f'{key}_max_rank']})")
    if last.get("host_rss_bytes_max") is not None:
        parts.append(f"{readable.size(last['host_rss_bytes_max'])} host (rank {last['host_rss_bytes_max_rank']})")
    return ", ".join(parts) or "-"


def _checkpoints(run: Run) -> str:
    folder = run.folder / "checkpoints"
    names = sorted(p.name for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit())
    reached = run.steps[-1]["step"] if run.steps else 0
    names = [name for name in names if int(name.removeprefix("step_")) <= reached] or names  # later ones are damaged
    if not names:
        return "none"
    return f"{len(names)}, newest {folder / names[-1]}"


def _target(run: Run) -> str:
    bert = any("loss_mlm" in record for record in run.steps)
    return "masked token, plus nats per pair" if bert else "target token"


def _last_losses(run: Run) -> str:
    text = f"training loss {readable.loss(run.steps[-1]['loss'])}"
    return text + (f", held-out {readable.loss(run.evals[-1]['eval_loss'])}" if run.evals else "")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over SMOOTHING_SHARE of the values on each side. At the steep start the window shrinks on both sides, so
    that the curve is not bent; at the end only on the right. A value that is not finite stays a gap."""
    raw = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(raw)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(raw))
    reach = np.minimum(max(len(raw) // SMOOTHING_SHARE, 1), at)
    low, high = at - reach, np.minimum(at + reach + 1, len(raw))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan).tolist()


def _step_axis(axes: Any, tokens: Sequence[int], steps: Sequence[int]) -> None:
    """Steps along the top, placed where their tokens are (their relation need not be a straight line)."""
    from matplotlib.ticker import MaxNLocator

    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    marks = [
        n for n in MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(0, steps[-1]) if 0 <= n <= steps[-1]
    ]
    top.set_xticks(np.interp(marks, [0, *steps], [0, *tokens]).tolist(), [readable.count(n) for n in marks])
    top.set_xlabel("steps")
    top.spines[["right"]].set_visible(False)
