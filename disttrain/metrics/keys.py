"""Every key of metrics.jsonl: its unit, its formula, and the kinds of record that hold it. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["header", "step", "eval", "event", "summary"]
KINDS: tuple[Kind, ...] = ("step", "eval", "summary", "header", "event")
"""Kinds of record, in the order of the document's tables."""


@dataclass(frozen=True)
class Metric:
    """One key."""

    name: str
    unit: str
    """`-` for a pure number, a flag or a text."""
    formula: str
    kinds: tuple[Kind, ...]


_ANY: tuple[Kind, ...] = KINDS
_LOOP: tuple[Kind, ...] = ("step", "eval", "summary")
_STEP: tuple[Kind, ...] = ("step",)
_STEP_END: tuple[Kind, ...] = ("step", "summary")
_EVAL: tuple[Kind, ...] = ("eval", "summary")
_END: tuple[Kind, ...] = ("summary",)
_HEAD: tuple[Kind, ...] = ("header",)
_EVENT: tuple[Kind, ...] = ("event",)

_ALL = (
    Metric("kind", "-", "header, step, eval, event or summary", _ANY),
    Metric("time", "s", "Unix time at which the record was written", _ANY),
    Metric("non_finite", "-", "which keys are null because they were nan, inf or -inf; absent otherwise", _ANY),
    Metric("step", "steps", "optimizer steps done (an event may have none)", ("step", "eval", "summary", "event")),
    Metric("tokens_seen", "tokens", "sum over all steps of tokens processed by all ranks, without padding", _LOOP),
    Metric("elapsed_seconds", "s", "wall time of training, everything included, earlier processes added", _LOOP),
    Metric("train_seconds", "s", "sum of step times, warm-up steps included, earlier processes added", _LOOP),
    # step: the loss and what produced it
    Metric("loss", "nats", "sum over objectives of (sum of losses / count), over the whole global batch", _STEP_END),
    Metric("loss_mlm", "nats per masked token", "masked-token objective of a BERT", _STEP),
    Metric("loss_nsp", "nats per pair", "next-sentence objective of a BERT", _STEP),
    Metric("learning_rate", "-", "learning rate of this step's update", _STEP),
    Metric("grad_norm", "-", "global 2-norm of the gradient before clipping; null where the engine gives none", _STEP),
    Metric("gradient_clip_factor", "-", "what clipping multiplied the gradient with; null without clipping", _STEP),
    Metric("loss_scale", "-", "fp16 loss scale of this step; null without one", _STEP_END),
    Metric(
        "skipped_steps",
        "steps",
        "updates skipped so far because a gradient, or with watch.on_nonfinite=skip the loss, was no number",
        _STEP_END,
    ),
    # step: time
    Metric("interval_steps", "steps", "steps since the last step record: n", _STEP),
    Metric("warmup", "-", "true when one of the n steps is a warm-up step", _STEP),
    Metric("profiled", "-", "true when one of the n steps was looked at by a profiler", _STEP),
    Metric("step_seconds", "s", "time inside the n steps / n", _STEP),
    Metric("predicted_step_seconds", "s", "what compression.codec=auto expects; null where it was not asked", _STEP),
    Metric("tokens_per_second", "tokens/s", "tokens of the n steps / time inside them", _STEP),
    Metric("tokens_per_second_per_rank", "tokens/s", "tokens_per_second / world size", _STEP),
    Metric("sequences_per_second", "sequences/s", "sequences of the n steps / time inside them", _STEP),
    Metric("target_tokens", "tokens", "predicted targets of the n steps / n", _STEP),
    Metric("padded_tokens", "tokens", "padding positions of the n steps / n", _STEP),
    Metric(
        "data_seconds", "s", "time spent waiting for data in the n steps / n, worst rank; part of step_seconds", _STEP
    ),
    Metric(
        "own_seconds_max",
        "s",
        "data_seconds and time of forward passes (with a pipeline: in which its stages computed) of one rank in the n "
        "steps / n, worst rank",
        _STEP,
    ),
    Metric("own_seconds_max_rank", "-", "rank of own_seconds_max", _STEP),
    Metric("own_seconds_median", "s", "the same, median of all ranks", _STEP),
    # step: FLOPs
    Metric(
        "model_flops_per_second_per_rank",
        "FLOP/s",
        "causal FLOPs of a full-length sequence / its tokens x tokens_per_second / world size",
        _STEP,
    ),
    Metric("mfu_six_n", "-", "the same by the rule of thumb 6 N a token, N all parameters, / peak of one rank", _STEP),
    Metric("mfu_causal", "-", "model_flops_per_second_per_rank / peak of one rank; null on unknown hardware", _STEP),
    Metric("mfu_full", "-", "the same with attention counted over the whole square", _STEP),
    Metric(
        "hfu",
        "-",
        "FLOPs executed of a sequence, recomputation and padding included, x sequences_per_second / world size / peak of "
        "one rank",
        _STEP,
    ),
    # step: energy
    Metric(
        "energy_joules",
        "J",
        "energy of the n steps of what energy_source names, in a summary that of all steps of the run; null if unknown",
        _STEP_END,
    ),
    Metric("joules_per_token", "J/token", "energy_joules / tokens of the n steps", _STEP),
    # step: the worst rank
    Metric("peak_allocated_bytes_max", "bytes", "most device memory in tensors since start; null on a CPU", _STEP_END),
    Metric("peak_allocated_bytes_max_rank", "-", "rank of peak_allocated_bytes_max", _STEP_END),
    Metric(
        "peak_reserved_bytes_max", "bytes", "most device memory of the allocator since start; null on a CPU", _STEP_END
    ),
    Metric("peak_reserved_bytes_max_rank", "-", "rank of peak_reserved_bytes_max", _STEP_END),
    Metric("host_rss_bytes_max", "bytes", "most resident host memory of one process since it started", _STEP_END),
    Metric("host_rss_bytes_max_rank", "-", "rank of host_rss_bytes_max", _STEP_END),
    Metric("host_rss_current_bytes_max", "bytes", "most resident host memory of one process now", _STEP_END),
    Metric(
        "comm_bytes_per_step",
        "bytes",
        "payload handed to all collectives in the n steps / n, by the rank with the most",
        _STEP_END,
    ),
    Metric("comm_bytes_uncompressed_per_step", "bytes", "the same, had no codec been used", _STEP_END),
    Metric(
        "wire_bytes_per_step", "bytes", "what leaves the rank with the most in the n steps / n, with rings", _STEP_END
    ),
    Metric(
        "pipeline_bubble_fraction",
        "-",
        "1 - time in which stages computed / time inside the schedule, both summed over ranks and the n steps; "
        "null without a pipeline",
        _STEP_END,
    ),
    Metric(
        "pipeline_bubble_fraction_theory",
        "-",
        "the same for equal stages and free sending, by the schedule's formula; null without a pipeline",
        _STEP_END,
    ),
    # eval
    Metric("eval_loss", "nats", "as loss, on held-out data, without dropout or label smoothing", _EVAL),
    Metric("eval_loss_mlm", "nats per masked token", "held-out masked-token objective of a BERT", _EVAL),
    Metric("eval_loss_nsp", "nats per pair", "held-out next-sentence objective of a BERT", _EVAL),
    Metric("perplexity", "-", "exp(eval_loss) for a GPT, exp(eval_loss_mlm) for a BERT", _EVAL),
    Metric("mlm_accuracy", "-", "masked tokens whose likeliest prediction is right / masked tokens", _EVAL),
    Metric("nsp_accuracy", "-", "pairs classified right / pairs", _EVAL),
    Metric("classify_accuracy", "-", "held-out examples classified right / examples with a label", _EVAL),
    Metric("tag_accuracy", "-", "held-out words, each by its first token, tagged right / tagged words", _EVAL),
    Metric("answer_accuracy", "-", "held-out windows whose both ends are found / windows with an answer known", _EVAL),
    Metric("score_*", "-", "official scores of a task's held-out examples by name (disttrain.scores)", _EVAL),
    Metric("eval_sequences", "sequences", "held-out sequences used", ("eval",)),
    # summary
    Metric("stop_reason", "-", "why the run ended: steps, time, target_loss, patience or interrupted", _END),
    Metric("evaluation_seconds", "s", "time of evaluations, earlier processes added", _END),
    Metric("checkpoint_seconds", "s", "time in which training waited for checkpoints, earlier processes added", _END),
    Metric("choosing_seconds", "s", "time of looking at the link and choosing a codec after the start", _END),
    Metric("profiling_seconds", "s", "time of preparing and writing a profile, earlier processes added", _END),
    Metric("logging_seconds", "s", "time of collecting and writing records, earlier processes added", _END),
    Metric("best_eval_loss", "nats", "lowest eval_loss", _END),
    Metric("best_eval_step", "steps", "step of best_eval_loss", _END),
    Metric(
        "measured_steps", "steps", "steps of this process in step records without a warm-up or profiled step: m", _END
    ),
    Metric("mean_step_seconds", "s", "time inside the m steps / m", _END),
    Metric("median_step_seconds", "s", "median of step_seconds over the records of the m steps", _END),
    Metric("tokens_per_second_mean", "tokens/s", "tokens of the m steps / time inside them", _END),
    Metric("tokens_per_second_per_rank_mean", "tokens/s", "tokens_per_second_mean / world size", _END),
    Metric("sequences_per_second_mean", "sequences/s", "sequences of the m steps / time inside them", _END),
    Metric("model_flops_per_second_per_rank_mean", "FLOP/s", "model_flops_per_second_per_rank over the m steps", _END),
    Metric("mfu_six_n_mean", "-", "mfu_six_n over the m steps", _END),
    Metric("mfu_causal_mean", "-", "mfu_causal over the m steps", _END),
    Metric("mfu_full_mean", "-", "mfu_full over the m steps", _END),
    Metric("hfu_mean", "-", "hfu over the m steps", _END),
    Metric("joules_per_token_mean", "J/token", "energy of the m steps / their tokens", _END),
    # header
    Metric("name", "-", "run.name", _HEAD),
    Metric("config", "-", "the resolved configuration, as in config.yaml", _HEAD),
    Metric("mesh", "-", "ranks on every axis", _HEAD),
    Metric("world_size", "ranks", "processes of the run", _HEAD),
    Metric("launcher", "-", "what started the processes", _HEAD),
    Metric("versions", "-", "disttrain, Python, torch and the packages in use", _HEAD),
    Metric("hardware", "-", "host, device name and count, cores, memory", _HEAD),
    Metric("precision", "-", "precision of this process, after auto", _HEAD),
    Metric("parameters", "-", "parameters of the whole model, tied ones once", _HEAD),
    Metric("flops_six_n_per_sequence", "FLOP", "6 x parameters x tokens of a full-length sequence", _HEAD),
    Metric("flops_causal_per_sequence", "FLOP", "forward and backward of one sequence, causal attention", _HEAD),
    Metric("flops_full_per_sequence", "FLOP", "the same with attention over the whole square", _HEAD),
    Metric("flops_hardware_per_sequence", "FLOP", "the same with what is executed, recomputation included", _HEAD),
    Metric(
        "peak_flops_per_second", "FLOP/s", "dense peak of one rank's device in this precision; null if unknown", _HEAD
    ),
    Metric("peak_flops_source", "-", "where that number comes from, or why there is none", _HEAD),
    Metric("energy_source", "-", "which counters energy_joules is of, or why it is null", _HEAD),
    Metric("git_commit", "-", "commit of disttrain, with + when its tree was changed; null if unknown", _HEAD),
    Metric("resumed_step", "steps", "step of the checkpoint that this process started from; null for a new run", _HEAD),
    # event
    Metric(
        "event",
        "-",
        "name of the event, for example checkpoint_saved, loss_spike, rolled_back, slow_rank, sink_failed",
        _EVENT,
    ),
    Metric("message", "-", "one sentence for a person", _EVENT),
    Metric("details", "-", "whatever else the event says, as an object", _EVENT),
)

SCORES = "score_*"
"""Stands for the official scores, whose names are those of `disttrain.sets`."""
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every documented key."""


def unknown_keys(record: Mapping[str, Any]) -> list[str]:
    """Keys of a record that are not documented for its kind."""
    names = {key: SCORES if key.startswith(SCORES[:-1]) else key for key in record}
    return sorted(k for k, name in names.items() if name not in METRICS or record["kind"] not in METRICS[name].kinds)


def markdown_tables() -> str:
    """The tables of docs/measurement.md, one for each kind; a key stands in the first kind that holds it."""
    parts = []
    written: set[str] = set()
    for kind in KINDS:
        rows = [m for m in METRICS.values() if kind in m.kinds and m.name not in written]
        written.update(m.name for m in rows)
        lines = [f"| `{m.name}` | {m.unit} | {m.formula} | {', '.join(m.kinds)} |" for m in rows]
        parts.append(
            "\n".join([f"### {kind}", "", "| key | unit | formula | in |", "| --- | --- | --- | --- |", *lines])
        )
    return "\n\n".join(parts) + "\n"
