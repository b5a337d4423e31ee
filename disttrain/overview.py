"""What `disttrain check` shows of a good config: mesh, batch arithmetic, length and predicted memory. No torch."""

from rich.console import Group
from rich.table import Table

from disttrain import costs, preflight
from disttrain.config.checks import total_steps
from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.loggers.readable import count, size
from disttrain.mesh import AXES, Mesh, build_mesh

LIKELY_VOCABULARY = {"bytes": 261, "gpt2": 50257, "bert": 30522}
"""Rows of the embedding before the tokenizer was trained or read; trained ones have data.tokenizer_vocab_size."""


def overview(config: Config, world_size: int) -> Group:
    """The tables of a config without problems, for this many ranks."""
    data = config.data
    rows = config.model.vocab_size or LIKELY_VOCABULARY.get(data.tokenizer, data.tokenizer_vocab_size)
    config = with_values(config, {"model.vocab_size": rows})
    path, damaged = preflight.resume_from(config)
    start = f"resumes from {path}" if path else "starts a new run"
    notes = [f"checkpoint not used: {line}" for line in damaged]
    mesh = build_mesh(config.parallel, world_size)
    return Group(
        _shape(config, mesh), "", _memory(config, mesh), "", f"{preflight.run_folder(config)}: {start}", *notes
    )


def _shape(config: Config, mesh: Mesh) -> Table:
    train, steps = config.train, total_steps(config) or 0
    share = train.global_batch_size // mesh.data_ranks
    micro = train.micro_batch_size or share
    parameters = costs.parameter_count(config.model)
    tokens = train.global_batch_size * config.data.sequence_length
    flops = costs.training_flops_per_sequence(config.model, config.data.sequence_length, causal=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    model = config.model
    table.add_row("model", f"{model.preset or model.family}: {model.layers} layers, {model.hidden_size} wide, "
                           f"{model.heads} heads, vocabulary {model.vocab_size:,}")  # fmt: skip
    table.add_row("parameters", f"{count(parameters.total)} ({count(parameters.embedding)} in embeddings)")
    table.add_row(
        "ranks", f"{mesh.world_size} = " + " x ".join(f"{axis} {n}" for axis, n in zip(AXES, mesh.sizes, strict=True))
    )
    table.add_row("batch", f"{train.global_batch_size} sequences = {mesh.data_ranks} data ranks x {share // micro} "
                           f"micro-batches x {micro} sequences")  # fmt: skip
    table.add_row("step", f"{count(tokens)} tokens, {count(train.global_batch_size * flops)}FLOP forward and backward")
    table.add_row("run", f"{steps:,} steps, {count(steps * tokens)} tokens, "
                         f"{count(steps * train.global_batch_size * flops)}FLOP")  # fmt: skip
    return table


def _memory(config: Config, mesh: Mesh) -> Table:
    """Predicted bytes of one rank; activations are an estimate of the peak (disttrain.costs says of what)."""
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    each = costs.state_bytes_per_parameter(precision)
    parameters = costs.parameter_count(config.model).total
    micro = config.train.micro_batch_size or config.train.global_batch_size // mesh.data_ranks
    activations = costs.activation_bytes(config.model, config.data.sequence_length, micro, precision)
    table = Table(title=f"predicted memory of a rank, {precision}", title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    parts = {"weights": parameters * each.weight, "low-precision copy": parameters * each.compute_copy,
             "gradients": parameters * each.gradient, "optimizer": parameters * each.optimizer,
             "activations": activations.total}  # fmt: skip
    for name, amount in parts.items():
        if amount:
            table.add_row(name, size(amount))
    table.add_row("[bold]together", f"[bold]{size(sum(parts.values()))}")
    kept = costs.checkpoint_bytes(config.model, precision)
    table.add_row(f"on disk: {config.checkpoint.keep} checkpoints", size(kept * config.checkpoint.keep))
    return table
