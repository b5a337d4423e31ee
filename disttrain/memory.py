"""What one rank of a layout holds: parameters, ZeRO's bytes, activations in flight (no torch).

The formulas of `disttrain.costs` put together; `docs/measurement.md` has them in prose.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from disttrain import costs
from disttrain.config.coded import may_be_coded
from disttrain.config.presets import shape_of
from disttrain.config.schema import Config, ModelConfig, Precision
from disttrain.costs import ActivationBytes, StateBytes
from disttrain.mesh import Mesh
from disttrain.stages import layers_of_stages, stage_numbers, virtual_stages

Shapes = dict[str, tuple[int, ...]]
"""Shapes of parameters by name."""


def parameter_shapes(
    model: ModelConfig, layers: range, first: bool = True, last: bool = True, tensor: int = 1, tensor_rank: int = 0
) -> Shapes:
    """Every parameter that a rank holds of a stage, by name: these blocks, the embedding if first, the head if last.

    Over the tensor axis qkv and up are cut by rows, out and down by columns, embedding and decoder by the vocabulary;
    norms, positions and the other biases stay whole. Chunks are torch.chunk's: rank 0 has the largest. A stage with
    embedding and head holds their tied weight once, the last stage of several a copy.
    """
    shape = shape_of(model)
    h, f = shape.hidden_size, shape.ffn_hidden_size

    def part(size: int) -> int:
        each = -(-size // tensor)
        return max(0, min(size - tensor_rank * each, each))

    found: Shapes = {}
    if first:
        found["embed.tokens.weight"] = (part(shape.vocab_size), h)
        found["embed.positions.weight"] = (shape.max_positions, h)
        if model.family == "bert":
            found |= {"embed.token_types.weight": (2, h), **_vectors("embed.norm", h)}
    for number in layers:
        block = f"blocks.{number}"
        found |= {
            **_vectors(f"{block}.attn_norm", h),
            **_vectors(f"{block}.mlp_norm", h),
            **_linear(f"{block}.attn.qkv", part(3 * h), h),
            **_linear(f"{block}.attn.out", h, part(h), bias=h),
            **_linear(f"{block}.mlp.up", part(f), h),
            **_linear(f"{block}.mlp.down", h, part(f), bias=h),
        }
    if last:
        found |= _vectors("head.norm", h)
        if not first:
            found["head.decoder.weight"] = (part(shape.vocab_size), h)
        if model.family == "bert":
            found["head.decoder.bias"] = (part(shape.vocab_size),)
            found |= {**_linear("head.transform", h, h), **_linear("head.pooler", h, h)}
            found |= _linear("head.next_sentence", 2, h)
    return found


def copied_parameters(model: ModelConfig, layers: range, first: bool, last: bool, tensor: int) -> set[str]:
    """Those that every tensor rank holds whole."""
    cut = parameter_shapes(model, layers, first, last, tensor)
    whole = parameter_shapes(model, layers, first, last)
    return {name for name, shape in cut.items() if tensor > 1 and shape == whole[name]}


def _vectors(norm: str, size: int) -> Shapes:
    return {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}


def _linear(name: str, rows: int, columns: int, bias: int | None = None) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows if bias is None else bias,)}


def zero_bytes(
    shapes: Mapping[str, tuple[int, ...]], zero: int, ranks: int, precision: Precision, accumulates: bool = True
) -> StateBytes:
    """Bytes of weights, gradients and optimizer at the peak of a step (Rajbhandari et al. 2020, section 5).

    `shapes` are the parameters of one stage, P elements, shared by N `ranks`. With w bytes for a master value (4, or 8
    in fp64) and c for one of the compute type (2 in bf16 and fp16, else w):

        stage    weight    compute copy              gradient    optimizer
        0        w P       c P if c < w              w P         2 w P
        1        w P / N   c P                       w P         2 w P / N
        2        w P / N   c P                       w P / N     2 w P / N
        3        w P / N   c (two blocks, the rest)  w P / N     2 w P / N

    Weight and optimizer are the paper's K = 12 bytes. FSDP2 cuts rows, rounded up; the blocks' norms stay whole on every
    rank and count as at stage 0, a half per cent of a block. What is gathered: blocks in the compute type; the rest
    (embedding, head) in the master type, of which autocast makes a copy, and at stage 3 from forward to backward too; of
    the blocks one that works and one that is on its way. Gradients of stage 1 are scattered at once, as at stage 2, when a
    step has one micro-batch only (`accumulates` is false).
    """
    each = costs.state_bytes_per_parameter(precision)
    whole = sum(map(prod, shapes.values()))
    if zero == 0:
        return StateBytes(*(whole * number for number in each))
    held = rest = 0
    blocks: dict[str, int] = {}
    for name, (rows, *others) in shapes.items():
        held += rows if _block_norm(name) else prod((-(-rows // ranks), *others))
        if not name.startswith("blocks."):
            rest += prod((rows, *others))
        elif not _block_norm(name):
            number = name.split(".")[1]
            blocks[number] = blocks.get(number, 0) + prod((rows, *others))
    gathered = sorted(blocks.values(), reverse=True)[: 2 if zero == 3 else None]
    copy = sum(gathered) * (each.compute_copy or each.weight) + rest * (each.compute_copy + each.weight)
    gradients = whole if zero == 1 and accumulates else held
    return StateBytes(held * each.weight, copy, gradients * each.gradient, held * each.optimizer)


def _block_norm(name: str) -> bool:
    return name.startswith("blocks.") and "_norm." in name


def in_flight(schedule: str, rank: int, ranks: int, virtual: int, micro_batches: int) -> tuple[int, int]:
    """Activations that a pipeline rank holds at most, of one micro-batch in one of its stages each; and how many of
    them are the last stage's, where that is on this rank.

    P ranks, v stages each, M micro-batches, in rounds of R = M // max(1, M // P): gpipe and looped_bfs hold all v M;
    1f1b P - r on rank r (Narayanan et al. 2021, section 2.2); interleaved_1f1b the warm-up of (v - 1) R + 2 (P - r - 1)
    and one more (ibid.); interleaved_zero_bubble (v - 1) R + P, since weights' gradients wait; zbv 2 P (Qi et al. 2024);
    dualpipev 2 P + 1. Never more than v M. Held to torch's own lists of actions by a test.
    """
    p, v, m = ranks, virtual, micro_batches
    rounds = m // max(1, m // p)
    all_, last = {
        "gpipe": (v * m, m),
        "looped_bfs": (v * m, m),
        "1f1b": (p - rank, 1),
        "interleaved_1f1b": ((v - 1) * rounds + 2 * (p - rank - 1) + 1, 1),
        "interleaved_zero_bubble": ((v - 1) * rounds + p, p),
        "zbv": (2 * p, 1),
        "dualpipev": (2 * p + 1, 1),
    }[schedule]
    return min(all_, v * m), min(last, m)


class RankMemory(NamedTuple):
    """Predicted bytes of one pipeline rank; its data, context and tensor ranks hold no more."""

    layers: list[range]
    """Blocks of each of its stages."""
    parameters: int
    """Elements of the parameters whose gradients it computes."""
    state: StateBytes
    activations: ActivationBytes
    host: int
    """What of the state ZeRO keeps in host memory (parallel.offload)."""
    feedback: int = 0
    """Residuals of coded gradients: one value for each that this rank codes, twice while a step may still be skipped."""

    outer: int = 0
    """Outer weights of workers that take steps of their own, and their momentum (`outer.method`)."""

    @property
    def total(self) -> float:
        """Bytes where it computes, host memory of offloading apart."""
        return self.state.total + self.activations.total + self.feedback + self.outer - self.host


def predict(config: Config, mesh: Mesh, precision: Precision, micro_batches: int) -> list[RankMemory]:
    """One entry for each pipeline rank. The model is resolved, the layout legal (`disttrain.layout`)."""
    parallel, model, size = config.parallel, config.model, mesh.pipeline
    virtual = virtual_stages(parallel.schedule, parallel.virtual_stages) if size > 1 else 1
    layers = layers_of_stages(model, config.data.sequence_length, size * virtual)
    found = []
    for rank in range(size):
        numbers = stage_numbers(parallel.schedule, rank, size, virtual) if size > 1 else [0]
        state, parameters = StateBytes(0, 0, 0, 0), 0
        for number in numbers:
            ends = number == 0, number == size * virtual - 1
            shapes = parameter_shapes(model, layers[number], *ends, tensor=mesh.tensor)
            parameters += sum(map(prod, shapes.values()))
            more = zero_bytes(shapes, parallel.zero, mesh.shard * mesh.context, precision, micro_batches > 1)
            state = StateBytes(*(a + b for a, b in zip(state, more, strict=True)))
            if config.compression.codec == "onebit_lamb":  # fresh second moments of matrices
                fresh = sum(prod(shape) for shape in shapes.values() if len(shape) > 1)
                each = costs.state_bytes_per_parameter(precision).weight
                state = state._replace(optimizer=state.optimizer + fresh * each)
        held = [layers[number] for number in numbers]
        last = numbers[-1] == size * virtual - 1
        activations = _activations(config, mesh, precision, micro_batches, rank, held, last)
        moved = parallel.offload and parallel.zero
        host = state.weight + state.optimizer + (state.gradient if parallel.zero > 1 else 0) if moved else 0
        data, replicas = mesh.replicate * mesh.shard * mesh.context, mesh.replicate
        feedback = sum(
            residual_bytes(config, precision, layers[n], n == 0, n == size * virtual - 1,
                           mesh.tensor, parallel.zero, data, replicas)
            for n in numbers
        )  # fmt: skip
        outer = {"none": 0, "nesterov": 2}.get(config.outer.method, 1) * int(state.weight)
        found.append(RankMemory(held, parameters, state, activations, host, feedback, outer))
    return found


def residual_bytes(
    config: Config, precision: Precision, layers: range, first: bool, last: bool,
    tensor: int, zero: int, data: int, replicas: int,
) -> int:  # fmt: skip
    """What error feedback remembers of a stage: of its cut parameters under tensor parallelism, of shards under HSDP. `data`
    are all ranks whose gradients are summed."""
    compression = config.compression
    if compression.codec == "none" or not compression.feeds_back or data == 1:
        return 0
    shapes = parameter_shapes(config.model, layers, first, last, tensor=tensor)
    copied = copied_parameters(config.model, layers, first, last, tensor)
    shards = data // replicas if zero and replicas > 1 else 1
    local = {name: (-(-rows // shards), *others) for name, (rows, *others) in shapes.items() if name not in copied}
    total = sum(prod(shape) for name, shape in local.items() if may_be_coded(compression, name, shape))
    may_skip = precision == "fp16" and config.outer.method == "none"
    return total * costs.state_bytes_per_parameter(precision).weight * (2 if may_skip else 1)


def _activations(
    config: Config, mesh: Mesh, precision: Precision, micro_batches: int, rank: int, held: list[range], last: bool
) -> ActivationBytes:
    """All in flight, each counted as the rank's longest stage."""
    parallel = config.parallel
    size = config.train.global_batch_size // mesh.data_ranks // micro_batches
    chunks, heads = 1, 1
    if mesh.pipeline > 1:
        chunks, heads = in_flight(parallel.schedule, rank, mesh.pipeline, len(held), micro_batches)

    def of(layers: int, head: bool) -> ActivationBytes:
        return costs.activation_bytes(
            config.model, config.data.sequence_length, size, precision, parallel.recompute, layers=layers, head=head,
            tensor=mesh.tensor, sequence=parallel.sequence, context=mesh.context,
        )  # fmt: skip

    blocks, head = of(max(map(len, held)), False), of(0, True)
    saved = chunks * blocks.saved + (heads * head.saved if last else 0)
    return ActivationBytes(saved, max(blocks.working, head.working if last else 0))
