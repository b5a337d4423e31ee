"""What `disttrain check` shows of a good config: mesh, batch arithmetic, length and predicted memory. No torch."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disttrain import costs, hardware, memory, preflight
from disttrain.config.checks import checkpoints_on_disk, total_steps
from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.loggers.readable import count, size
from disttrain.loggers.readable import flops as flops_text
from disttrain.mesh import AXES, Mesh, build_mesh
from disttrain.stages import layers_of_stages, stage_numbers, theoretical_bubble, virtual_stages

LIKELY_VOCABULARY = {"bytes": 261, "gpt2": 50257, "bert": 30522, "words": 20_000}
"""Rows of the embedding before the tokenizer was trained or read; trained ones have data.tokenizer_vocab_size."""

NO_MEMORY = "predicted memory: there is no formula for the activations of a task's model"
CONVENTIONS = {"six_n": "6N", "causal": "causal", "full": "full attention", "hardware": "executed"}
"""What the ways to count FLOPs are called (docs/measurement.md)."""


def likely_vocabulary(config: Config) -> int:
    """Rows of the embedding, as far as they are known before the tokenizer is there."""
    data = config.data
    return config.model.vocab_size or LIKELY_VOCABULARY.get(data.tokenizer, data.tokenizer_vocab_size)


def overview(config: Config, world_size: int) -> Group:
    """The tables of a config without problems, for this many ranks."""
    config = with_values(config, {"model.vocab_size": likely_vocabulary(config)})
    path, damaged = preflight.resume_from(config)
    start = f"resumes from {path}" if path else "starts a new run"
    notes = [Text(f"checkpoint not used: {line}") for line in damaged]
    mesh = build_mesh(config.parallel, world_size)
    memory_of = _memory(config, mesh) if config.model.head == "lm" else Text(NO_MEMORY)
    return Group(_shape(config, mesh), "", memory_of, "", Text(f"{preflight.run_folder(config)}: {start}"), *notes)


def _shape(config: Config, mesh: Mesh) -> Table:
    train, steps = config.train, total_steps(config) or 0
    share = train.global_batch_size // mesh.data_ranks
    micro = train.micro_batch_size or share
    tokens = train.global_batch_size * config.data.sequence_length
    parameters, conventions = _size(config)
    flops = conventions["causal"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    model = config.model
    of_size = "" if model.head_size is None else f" of {model.head_size}"
    name = model.source or model.preset or model.family  # not markup: file.py:Class: would be a picture
    shape = f"{model.layers} layers, {model.hidden_size} wide, {model.heads} heads{of_size}, "
    shape += f"vocabulary {model.vocab_size:,}"
    if model.head != "lm":
        width = {"text_cnn": model.channels}.get(model.family, model.hidden_size)
        shape = f"{width} wide, to {model.head}" + (f" {model.labels} labels" if model.labels else "")
    table.add_row("model", Text(f"{name}: {shape}"))
    table.add_row("parameters", parameters)
    table.add_row(
        "ranks", f"{mesh.world_size} = " + " x ".join(f"{axis} {n}" for axis, n in zip(AXES, mesh.sizes, strict=True))
    )
    for name, text in _layout(config, mesh, share // micro):
        table.add_row(name, text)
    table.add_row("batch", f"{train.global_batch_size} sequences = {mesh.data_ranks} data ranks x {share // micro} "
                           f"micro-batches x {micro} sequences")  # fmt: skip
    each = ", ".join(f"{CONVENTIONS[name]} {count(train.global_batch_size * value)}FLOP"
                     for name, value in conventions.items())  # fmt: skip
    table.add_row("step", f"{count(tokens)} tokens; {each}")
    table.add_row("peak of a rank", _peak(config))
    length = f"{config.train.epochs:g} epochs, or " if config.train.epochs and steps else ""
    if config.train.epochs and not steps:
        table.add_row("run", f"{config.train.epochs:g} epochs; their steps are known when the examples are prepared")
        return table
    table.add_row("run", f"{length}{steps:,} steps, {count(steps * tokens)} tokens, "
                         f"{count(steps * train.global_batch_size * flops)}FLOP, causal")  # fmt: skip
    return table


def _size(config: Config) -> tuple[str, dict[str, float]]:
    """Parameters in words, and FLOPs of training on one sequence by conventions; a model of the user's own is counted, with
    torch."""
    model, length = config.model, config.data.sequence_length
    if model.source is not None:
        from disttrain.parallel.own_model import measure

        parameters, forward = measure(model, length)
        six_n = costs.six_n_flops_per_sequence(parameters, length)
        return f"{count(parameters)}, counted", {"six_n": six_n, "causal": 3 * forward}
    found = costs.parameter_count(model)
    return f"{count(found.total)} ({count(found.embedding)} in embeddings)", costs.flops_per_sequence(config)


def _peak(config: Config) -> str:
    """What the device of this machine reaches at most, and where the figure is from."""
    gpu = hardware.gpu_name() if config.run.device != "cpu" else None
    precision = "bf16" if config.precision == "auto" else config.precision
    found = hardware.peak_flops(gpu or hardware.cpu_name(), precision)
    if found is None:
        return f"- (no datasheet figure for {gpu or hardware.cpu_name()}, so MFU will be unknown here)"
    return f"{flops_text(found[0])} in {precision}, {gpu} ({found[1]})"


def _layout(config: Config, mesh: Mesh, micro_batches: int) -> Iterator[tuple[str, str]]:
    """A row for each axis that is used."""
    parallel, length = config.parallel, config.data.sequence_length
    if mesh.tensor > 1:
        beside = f", positions between matrices over {mesh.tensor} ranks" if parallel.sequence else ""
        yield "tensor", f"{config.model.heads // mesh.tensor} heads a rank{beside}"
    if mesh.context > 1:
        yield "context", f"{length // mesh.context} of {length} tokens a rank, {parallel.context_method}"
    if mesh.pipeline > 1:
        virtual = virtual_stages(parallel.schedule, parallel.virtual_stages)
        layers = layers_of_stages(config.model, length, mesh.pipeline * virtual)
        bubble = theoretical_bubble(parallel.schedule, mesh.pipeline, virtual, micro_batches)
        yield "pipeline", f"{parallel.schedule}, {micro_batches} micro-batches, theoretical bubble {bubble:.1%}"
        for rank in range(mesh.pipeline):
            held = [layers[number] for number in stage_numbers(parallel.schedule, rank, mesh.pipeline, virtual)]
            yield f"  rank {rank}", "layers " + " and ".join(_numbers(part) for part in held)
    if parallel.zero:
        replicas = f", {mesh.replicate} replicas" if mesh.replicate > 1 else ""
        where = ", kept in host memory" if parallel.offload else ""
        yield "ZeRO", f"stage {parallel.zero} over {mesh.shard * mesh.context} ranks{replicas}{where}"


def _numbers(layers: range) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _memory(config: Config, mesh: Mesh) -> Group:
    """Predicted bytes of the worst rank; activations are an estimate of the peak (disttrain.memory says of what)."""
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    share = config.train.global_batch_size // mesh.data_ranks
    ranks = memory.predict(config, mesh, precision, share // (config.train.micro_batch_size or share))
    worst = max(ranks, key=lambda rank: rank.total)
    which = f" (pipeline rank {ranks.index(worst)}, the worst)" if mesh.pipeline > 1 else ""
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    state = worst.state
    parts = {
        "weights": state.weight,
        "gathered weights" if config.parallel.zero else "low-precision copy": state.compute_copy,
        "gradients": state.gradient,
        "optimizer": state.optimizer,
        "error feedback": worst.feedback,
        "outer weights": worst.outer,
        "activations": worst.activations,
        "buffers": worst.buffers,
        "of these in host memory": worst.host,
    }
    for name, amount in parts.items():
        if amount:
            table.add_row(name, size(amount))
    table.add_row("[bold]together" + (" on the device" if worst.host else ""), f"[bold]{size(worst.total)}")
    kept = memory.checkpoint_bytes(config, precision)
    if config.outer.method != "none":  # each worker's weights and moments beside the common ones, and outer momentum
        workers = mesh.replicate if config.parallel.zero else mesh.data_ranks
        weights = costs.parameter_count(config.model).total * costs.state_bytes_per_parameter(precision).weight
        kept += workers * kept + (weights if config.outer.method == "nesterov" else 0)
    count = checkpoints_on_disk(config)
    table.add_row(f"on disk: {count} checkpoints", size(kept * count))
    whose = ", as if its layers were the family's" if config.model.source else ""
    return Group(f"[italic]predicted memory of a rank{which}, {precision}{whose}", table)
