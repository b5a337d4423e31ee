"""What one rank of a layout holds: parameters, ZeRO's bytes, activations in flight (no torch).

The formulas of `disttrain.costs` put together; `docs/measurement.md` has them in prose.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from disttrain import costs, task_shapes
from disttrain.config.coded import may_be_coded
from disttrain.config.optimizer import OptimConfig, is_hidden
from disttrain.config.presets import shape_of
from disttrain.config.schema import Config, ModelConfig, ParallelConfig, Precision
from disttrain.costs import ActivationBytes, Device, Recompute, StateBytes
from disttrain.mesh import Mesh
from disttrain.moments import InFlight, Parameters, Sharing, moments
from disttrain.stages import SCHEDULES, layers_of_stages, stage_numbers, virtual_stages

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
    if task_shapes.is_small(model):
        return task_shapes.encoder_shapes(model) | task_shapes.head_shapes(model)
    shape = shape_of(model)
    h, f, a = shape.hidden_size, shape.ffn_hidden_size, shape.attention_size

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
            **_linear(f"{block}.attn.qkv", part(3 * a), h),
            **_linear(f"{block}.attn.out", h, part(a), bias=h),
            **_linear(f"{block}.mlp.up", part(f), h),
            **_linear(f"{block}.mlp.down", h, part(f), bias=h),
        }
    if last and model.head != "lm":
        found |= task_shapes.head_shapes(model)
    elif last:
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
    """Predicted bytes of one pipeline rank at its peak; its data, context and tensor ranks hold no more."""

    layers: list[range]
    """Blocks of each of its stages."""
    parameters: int
    """Elements of the parameters whose gradients it computes."""
    state: StateBytes
    """Copies and gradients are those that are there at that moment."""
    activations: float
    """Of all micro-batches in flight, and what works on top."""
    buffers: float
    """What is gathered, scattered or summed at that moment."""
    moment: str
    """When: one of `disttrain.moments`."""
    host: int
    """What of the state ZeRO keeps in host memory (parallel.offload)."""
    feedback: int = 0
    """Residuals of coded gradients: one value for each that this rank codes."""

    outer: int = 0
    """Outer weights of workers that take steps of their own, and their momentum (`outer.method`)."""

    @property
    def total(self) -> float:
        """Bytes where it computes, host memory of offloading apart."""
        return self.state.total + self.activations + self.buffers + self.feedback + self.outer - self.host


def predict(
    config: Config, mesh: Mesh, precision: Precision, micro_batches: int, device: Device | None = None
) -> list[RankMemory]:
    """One entry for each pipeline rank. The model is resolved, the layout legal (`disttrain.layout`). Without a `device`
    run.device says which kernels there are: a GPU's, unless it says cpu."""
    parallel, model, size = config.parallel, config.model, mesh.pipeline
    device = device or ("cpu" if config.run.device == "cpu" else "cuda")
    virtual = virtual_stages(parallel.schedule, parallel.virtual_stages) if size > 1 else 1
    layers = layers_of_stages(model, config.data.sequence_length, size * virtual)
    each, shards = costs.state_bytes_per_parameter(precision), mesh.shard * mesh.context
    data = mesh.replicate * shards
    sequences = config.train.global_batch_size // mesh.data_ranks // micro_batches
    block, head, passing = activations_of(config, precision, device, parallel, sequences, parallel.recompute)
    sharing = Sharing(parallel.zero, micro_batches > 1, data > 1 and config.outer.method == "none", size > 1, passing)
    found = []
    for rank in range(size):
        numbers = stage_numbers(parallel.schedule, rank, size, virtual) if size > 1 else [0]
        ends = [(n == 0, n == size * virtual - 1) for n in numbers]
        cut = 1 if parallel.zero == 0 else shards
        count = of_rank([of_stage(model, len(layers[n]), *end, mesh.tensor, cut)
                         for n, end in zip(numbers, ends, strict=True)])  # fmt: skip
        held = flight(parallel.schedule, rank, size, virtual, micro_batches, ends[-1][1])
        feedback = sum(
            residual_bytes(config, precision, layers[n], *end, mesh.tensor, parallel.zero, data, mesh.replicate)
            for n, end in zip(numbers, ends, strict=True)
        )
        sharing = sharing._replace(undecided=feedback if may_skip(config, precision) else 0)
        found_moments = moments(count, sharing, held, block, head, each.weight, each.compute_copy or each.weight)
        name, most = max(found_moments.items(), key=lambda item: item[1].total)
        optimizer = sum(
            optimizer_bytes(config, precision, len(layers[n]), *end, mesh.tensor, cut)
            for n, end in zip(numbers, ends, strict=True)
        )
        weight = count.held * each.weight
        state = StateBytes(weight, int(most.copies), int(most.gradients), optimizer)
        host = 0
        if parallel.offload and parallel.zero:
            host = weight + optimizer + (state.gradient if parallel.zero > 1 else 0)
        outer = {"none": 0, "nesterov": 2}.get(config.outer.method, 1) * weight
        found.append(RankMemory([layers[n] for n in numbers], count.whole, state, float(most.activations),
                                float(most.buffers), name, host, feedback, outer))  # fmt: skip
    return found


def of_stage(model: ModelConfig, layers: int, first: bool, last: bool, tensor: int, shards: int) -> Parameters:
    """Elements of the parameters of one stage with so many blocks on a tensor rank, of `shards` that ZeRO cuts them over."""
    block, ends = (parameter_shapes(model, range(n), *flags, tensor=tensor)
                   for n, flags in ((1, (False, False)), (0, (first, last))))  # fmt: skip
    matrices = {name: shape for name, shape in block.items() if not _block_norm(name)}

    def held(shapes: Shapes) -> int:
        return sum(prod(s if _block_norm(n) else (-(-s[0] // shards), *s[1:])) for n, s in shapes.items())

    rest, tied = sum(map(prod, ends.values())), first and last
    head = sum(prod(s) for n, s in ends.items() if n.startswith("head.") and len(s) > 1)
    embedding = prod(ends["embed.tokens.weight"]) if first else 0
    return Parameters(
        whole=layers * sum(map(prod, block.values())) + rest,
        held=layers * held(block) + held(ends),
        block=sum(map(prod, matrices.values())),
        blocks=layers,
        longest=layers,
        rest=rest,
        head=head + (embedding if tied else 0),
        embedding=embedding,
        tied=tied,
        largest=max(map(prod, matrices.values())),
    )


def of_rank(stages: Sequence[Parameters]) -> Parameters:
    """Of all stages of a rank."""
    whole, held, block, blocks, longest, rest, head, embedding, tied, largest = zip(*stages, strict=True)
    return Parameters(sum(whole), sum(held), block[0], sum(blocks), max(longest), sum(rest), sum(head), sum(embedding),
                      any(tied), largest[0])  # fmt: skip


def flight(schedule: str, rank: int, ranks: int, virtual: int, micro_batches: int, last: bool) -> InFlight:
    """What a pipeline rank, or a rank without a pipeline, holds of activations; `last` where it has the head."""
    if ranks == 1:
        return InFlight(1, 1, float(micro_batches > 1), 1, 1, 0)
    chunks, heads = in_flight(schedule, rank, ranks, virtual, micro_batches)
    all_ = virtual * micro_batches
    again, end = float(chunks < all_), chunks
    if SCHEDULES[schedule].placement == "loop":
        # backward passes come in rounds, each through one stage of this rank, which has its gradients from then on
        rounds = (
            micro_batches if schedule in ("gpipe", "looped_bfs") else micro_batches // max(1, micro_batches // ranks)
        )
        again = min(virtual, -(-(all_ - chunks) // rounds)) / virtual
        end = min(chunks, all_ - (virtual - 1) * rounds)
    late, waiting = {"interleaved_zero_bubble": (chunks, rank + 1), "zbv": (ranks + rank, 2 * rank + 1)}.get(
        schedule, (chunks, 0)
    )
    return InFlight(chunks, heads if last else 0, again, end, min(late, chunks), min(waiting, late, chunks))


def activations_of(
    config: Config, precision: Precision, device: Device, layout: ParallelConfig, size: int, recompute: Recompute
) -> tuple[ActivationBytes, ActivationBytes, float]:
    """Of one block and of the head, for one micro-batch of `size` sequences, and what one stage hands the next of it."""
    model, length = config.model, config.data.sequence_length
    ring = layout.context > 1 and layout.context_method == "ring"
    splits = layout.pipeline > 1 and SCHEDULES[layout.schedule].splits_backward
    fused = ring or costs.attention_is_fused(model, length, precision, device)
    axes: Any = {"tensor": layout.tensor, "sequence": layout.sequence, "context": layout.context}
    predicted = config.data.mlm_probability * length

    def of(layers: int, head: bool) -> ActivationBytes:
        return costs.activation_bytes(
            model, length, size, precision, recompute, fused, predicted, layers=layers, head=head, device=device, ring=ring,
            splits=splits, **axes,
        )  # fmt: skip

    return of(1, False), of(0, True), costs.passing_bytes(model, length, size, precision, **axes)


def optimizer_elements(optim: OptimConfig, name: str, whole: Sequence[int], held: int) -> int:
    """Elements of the state that an optimizer keeps of a parameter of this whole shape, of which a rank holds so many.

    adamw, lamb, adam and radam: two moments of each. sgd: one with momentum, else none. adagrad: one. rmsprop: one, one more
    with momentum, and one more if centered. adafactor: n + m of a whole matrix [n, m], whatever part of it is held, and one
    of each of a vector's. muon: one of a hidden matrix, else two.
    """
    if optim.name == "adafactor":
        return sum(whole) if len(whole) > 1 else held
    if optim.name == "muon":
        return held * (1 if is_hidden(name, len(whole)) else 2)
    return held * len(optim.state)


def optimizer_bytes(
    config: Config, precision: Precision, layers: int, first: bool, last: bool, tensor: int, shards: int = 1
) -> int:
    """The optimizer's state of a stage on a tensor rank, of `shards` that ZeRO cuts it over; with the second moments that
    1-bit LAMB goes on to learn of matrices beside those it has frozen."""
    fresh = config.compression.codec == "onebit_lamb"

    def elements(number: range, *ends: bool) -> int:
        cut = parameter_shapes(config.model, number, *ends, tensor=tensor)
        found = 0
        for name, whole in parameter_shapes(config.model, number, *ends).items():
            held = prod(cut[name] if _block_norm(name) else (-(-cut[name][0] // shards), *cut[name][1:]))
            found += optimizer_elements(config.optim, name, whole, held) + held * (fresh and len(whole) > 1)
        return found

    of_all = layers * elements(range(1), False, False) + elements(range(0), first, last)
    return of_all * costs.state_bytes_per_parameter(precision).weight


def checkpoint_bytes(config: Config, precision: Precision) -> int:
    """Bytes of one checkpoint: weights and the optimizer's state, 12 for each parameter under AdamW (24 in fp64); error
    feedback comes on top."""
    weights = costs.parameter_count(config.model).total * costs.state_bytes_per_parameter(precision).weight
    return weights + optimizer_bytes(config, precision, config.model.layers, True, True, 1)


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
    return total * costs.state_bytes_per_parameter(precision).weight


def may_skip(config: Config, precision: Precision) -> bool:
    """Whether residuals of a step are kept beside those before it until it is known that it counts."""
    return precision == "fp16" and config.outer.method == "none"
