"""What a model costs in parameters, FLOPs and bytes: the one home of every formula (no torch).

Letters: L layers, H hidden size, A heads, E width of all heads together (H, or less where heads were pruned), F
feed-forward width, V vocabulary, S sequence length, M predicted tokens of a BERT sequence. A multiply-add is two FLOPs;
only matrix products count, as in Narayanan et al. 2021 and Chowdhery et al. 2022 (PaLM), appendix B. The
backward pass of a product is two products of its size, so training is three times forward: this holds exactly, since even
the first layer needs its input's gradient, for the embeddings.

Four conventions of utilisation, each a function here divided by step time and peak:

- `mfu_six_n`: `six_n_flops_per_sequence`, without attention and with embeddings, as a rule of thumb;
- `mfu_causal`: `training_flops_per_sequence(causal=True)`, attention counted over GPT's causal triangle;
- `mfu_full`: `causal=False`, attention counted over the whole S x S square, as most published figures do;
- `hfu`: `hardware_flops_per_sequence`, what is computed when activations are recomputed, square attention.
"""

from typing import Literal, NamedTuple

from disttrain import task_shapes
from disttrain.config.presets import shape_of
from disttrain.config.schema import Config, DataConfig, ModelConfig, Precision
from disttrain.parameters import parameter_count

Recompute = Literal["none", "selective", "full"]


class ForwardFlops(NamedTuple):
    """FLOPs of one sequence's forward pass, by what recomputation treats alike."""

    block_linears: float
    attention: float
    """Q K^T and the weighted sum of V."""
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.block_linears + self.attention + self.head


def forward_flops_per_sequence(
    model: ModelConfig, sequence_length: int, causal: bool, predicted_tokens: float | None = None
) -> ForwardFlops:
    """FLOPs of one sequence's forward pass.

    - linears of the blocks: 2 S L (4 H E + 2 H F)
    - attention: 4 E L P, with P = S (S + 1) / 2 pairs if causal and the model is a GPT, else P = S^2
    - GPT head: 2 S H V
    - BERT heads: 2 M (H^2 + H V) for the M predicted tokens, and 2 (H^2 + 2 H) for pooler and next sentence, once

    predicted_tokens is M; BERT's default is the default mlm_probability times S. GPT predicts every token.
    """
    if task_shapes.is_small(model):
        return ForwardFlops(task_shapes.encoder_flops(model, sequence_length), 0,
                            task_shapes.head_flops(model, sequence_length))  # fmt: skip
    shape = shape_of(model)
    h, e, f, v, s = shape.hidden_size, shape.attention_size, shape.ffn_hidden_size, shape.vocab_size, sequence_length
    linears = 2 * s * shape.layers * (4 * h * e + 2 * h * f)
    pairs = s * (s + 1) // 2 if causal and model.family == "gpt" else s * s
    attention = 4 * e * shape.layers * pairs
    if model.head != "lm":
        return ForwardFlops(linears, attention, task_shapes.head_flops(model, s))
    if model.family == "gpt":
        return ForwardFlops(linears, attention, 2 * s * h * v)
    head = 2 * _predicted(sequence_length, predicted_tokens) * (h * h + h * v) + 2 * (h * h + 2 * h)
    return ForwardFlops(linears, attention, head)


def training_flops_per_sequence(
    model: ModelConfig, sequence_length: int, causal: bool, predicted_tokens: float | None = None
) -> float:
    """Model FLOPs of forward and backward for one sequence: three times forward, whatever is recomputed."""
    return 3 * forward_flops_per_sequence(model, sequence_length, causal, predicted_tokens).total


def hardware_flops_per_sequence(
    model: ModelConfig, sequence_length: int, recompute: Recompute, predicted_tokens: float | None = None
) -> float:
    """FLOPs computed for one sequence: training plus what is done twice (Korthikanti et al. 2022, section 4).

    full: the blocks' forward pass again, save for the last product of a GPT block without dropout (2 S H F): nothing in
    the backward pass needs its result, and torch's checkpoint stops before it. selective: attention again. Attention is
    counted as a whole square; what a fused kernel recomputes for itself in its backward pass is not counted.
    """
    shape = shape_of(model)
    forward = forward_flops_per_sequence(model, sequence_length, False, predicted_tokens)
    last = 2 * sequence_length * shape.layers * shape.hidden_size * shape.ffn_hidden_size
    whole = forward.block_linears + forward.attention
    skips_last = model.family == "gpt" and model.dropout == 0
    again = {"none": 0, "selective": forward.attention, "full": whole - last if skips_last else whole}
    return 3 * forward.total + again[recompute]


def six_n_flops_per_sequence(parameters: int, sequence_length: int) -> float:
    """The rule of thumb 6 N S (Hoffmann et al. 2022), N all parameters: for comparison with published figures."""
    return 6 * parameters * sequence_length


def flops_per_sequence(config: Config) -> dict[str, float]:
    """Forward and backward of one full-length sequence by the four conventions: six_n, causal, full, hardware."""
    model, length = config.model, config.data.sequence_length
    predicted = config.data.mlm_probability * length if model.family == "bert" else None
    return {
        "six_n": six_n_flops_per_sequence(parameter_count(model).total, length),
        "causal": training_flops_per_sequence(model, length, True, predicted),
        "full": training_flops_per_sequence(model, length, False, predicted),
        "hardware": hardware_flops_per_sequence(model, length, config.parallel.recompute, predicted),
    }


class StateBytes(NamedTuple):
    """Bytes in memory of one parameter under AdamW, or of all that a rank holds."""

    weight: int
    """Master weight: fp32, or fp64 for proofs."""
    compute_copy: int
    """What forward and backward pass multiply, where it is not the master weight: autocast's copy in bf16 or fp16, and
    what ZeRO gathers."""
    gradient: int
    optimizer: int
    """Two moments of one; `disttrain.memory` knows other optimizers."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weight + self.compute_copy + self.gradient + self.optimizer


def state_bytes_per_parameter(precision: Precision) -> StateBytes:
    """Bytes for each parameter of a rank that holds it whole (Rajbhandari et al. 2020, 3.1); see `disttrain.memory`."""
    wide = _wide_bytes(precision)
    return StateBytes(wide, 2 if precision in ("bf16", "fp16") else 0, wide, 2 * wide)


class ActivationBytes(NamedTuple):
    """Bytes that one micro-batch needs beside the state."""

    saved: float
    """Held from the forward to the backward pass."""
    working: float
    """The most that comes on top in the backward pass: the gradient of the logits and what the loss widens, or what of a
    block is recomputed and the gradients inside it."""

    deferred: float = 0.0
    """Where a schedule computes the gradients of weights later than those of inputs: the gradients that weights wait for."""

    @property
    def total(self) -> float:
        """What one rank holds of one micro-batch without a pipeline."""
        return self.saved + self.working


Device = Literal["cpu", "cuda"]
CHUNK_ELEMENTS: dict[str, int] = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits that the loss widens to float32 at a time: what fits a CPU core's cache; a GPU's launches against its memory."""
TILE_ELEMENTS: dict[str, int] = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores that ring attention computes at a time."""
UNFUSED_SEQUENCE = 512
"""Longest sequence, in tokens, for which half-precision attention on a CPU is computed by plain products."""


def attention_is_fused(model: ModelConfig, sequence_length: int, precision: Precision, device: Device) -> bool:
    """Whether the scores are never in memory as a whole (`disttrain.models.layers.attend`)."""
    plain = device == "cpu" and precision in ("bf16", "fp16") and sequence_length <= UNFUSED_SEQUENCE
    return model.dropout == 0 and not plain


class _Sizes(NamedTuple):
    """Bytes of one micro-batch on one rank, of which a block's activations are made up."""

    residual: float
    """Hidden states in the residual stream: w H T, of the positions that this rank has between the matrices."""
    input: float
    """The same as input of a product: c H T."""
    gathered: float
    """The same of all positions: with sequence parallelism they are gathered."""
    heads: float
    """Queries, or keys, or values, or the heads' output."""
    features: float
    """Input, or output, of the activation function: c F T."""
    scores: float
    """The largest of what attention holds of its scores: c A S T when not fused."""
    core: float
    """What attention saves for itself."""
    masks: float
    """Of both dropouts of the residual branches."""
    cast: bool
    """Whether products are of another type than the residual stream."""


def activation_bytes(
    model: ModelConfig,
    sequence_length: int,
    micro_batch_size: int,
    precision: Precision,
    recompute: Recompute = "none",
    fused_attention: bool = True,
    predicted_tokens: float | None = None,
    *,
    layers: int | None = None,
    head: bool = True,
    tensor: int = 1,
    sequence: bool = False,
    context: int = 1,
    device: Device = "cuda",
    ring: bool = False,
    splits: bool = False,
) -> ActivationBytes:
    """Activations of one micro-batch on one rank; of the whole model if no layout is given.

    Korthikanti et al. 2022, equation 2 (34 S B H + 5 A S^2 B bytes a block), adapted to this code: c bytes for an
    element of a matrix product (2, 4 or 8), w for one of the residual stream and the norms (4, or 8 in fp64), one for
    dropout's masks. For each token, a block saves

        2 w H + 2 c H    inputs of both norms, of qkv and of up
        4 c E            input of out; query, key and value
        2 c F            inputs of GELU and down
        4 A              log-sum-exp of fused attention, or c A S for its weights when it is not fused
        2 H + (c + 1) A S    with dropout, which no fused kernel does: masks, and weights before and after

    and the head w H + c H + c V (for BERT only at predicted tokens, with a second H x H layer: w H + 3 c H + c V).
    recompute=full keeps w H for each token and block; selective drops what attention saves for itself.

    In the backward pass of a block come on top: at GELU w H + c H + c F, once what was recomputed is there; at attention
    2 c A S (or 4 c E when fused) and w H, when 2 c F + w H + c H have been freed. Where a schedule `splits` the backward
    pass nothing has, and the gradients that weights wait for, 2 c H + c F, are there too; those of other micro-batches are
    `deferred` (3 c E + 2 c H + c F + 2 w H, of the head c V + w H).

    Tensor parallelism divides all of a block but the first line, sequence parallelism that one too (ibid., table 2), and
    of the head c V; context parallelism divides the tokens. A pipeline rank has some `layers`, and perhaps the head.
    """
    wide, narrow = _wide_bytes(precision), 2 if precision in ("bf16", "fp16") else _wide_bytes(precision)
    tokens = sequence_length * micro_batch_size / context
    sizes = _sizes(model, sequence_length, tokens, (wide, narrow), fused_attention, tensor, sequence)
    if ring:
        tile = min(
            TILE_ELEMENTS[device], micro_batch_size * shape_of(model).heads / tensor * (tokens / micro_batch_size) ** 2
        )
        sizes = sizes._replace(scores=2 * wide * tile)
    block = 2 * (sizes.residual + sizes.input) + 4 * sizes.heads + 2 * sizes.features + sizes.masks
    kept = {"none": block + sizes.core, "selective": block, "full": sizes.residual}[recompute]
    count = shape_of(model).layers if layers is None else layers
    working = _working(sizes, block, recompute, splits) if count else 0.0
    deferred = splits * count * _deferred(sizes, block, recompute)
    if not head:
        return ActivationBytes(count * kept, working, deferred)
    saved, logits = _head(model, sequence_length, tokens, predicted_tokens, tensor, (wide, narrow))
    widened = max(4, narrow) * min(2 * CHUNK_ELEMENTS[device], logits / narrow)
    deferred += splits * (logits + sizes.residual)
    return ActivationBytes(count * kept + saved, max(logits + widened, working), deferred)


def _sizes(
    model: ModelConfig, length: int, tokens: float, item: tuple[int, int], fused: bool, tensor: int, sequence: bool
) -> _Sizes:
    shape, (wide, narrow), between = shape_of(model), item, tokens / (tensor if sequence else 1)
    h, dropped, scores = shape.hidden_size, model.dropout > 0, shape.heads / tensor * length * tokens
    return _Sizes(
        residual=wide * h * between,
        input=narrow * h * between,
        gathered=narrow * h * tokens if sequence else 0.0,
        heads=narrow * shape.attention_size / tensor * tokens,
        features=narrow * shape.ffn_hidden_size / tensor * tokens,
        scores=0.0 if fused else narrow * scores,
        core=4 * shape.heads / tensor * tokens if fused else (narrow + dropped * (narrow + 1)) * scores,
        masks=2 * h * between * dropped,
        cast=narrow < wide,
    )


def _working(sizes: _Sizes, block: float, recompute: Recompute, splits: bool) -> float:
    """The most that a block's backward pass has beside what was saved."""
    again = {"none": 0.0, "selective": sizes.core, "full": block + sizes.core - sizes.residual}[recompute]
    gradients = sizes.residual + sizes.cast * sizes.input
    activation = gradients + sizes.features + 2 * sizes.gathered
    freed = 2 * sizes.features + sizes.residual + sizes.input if not splits else -2 * sizes.input - sizes.features
    attention = sizes.residual + (2 * sizes.scores + 2 * sizes.heads if sizes.scores else 4 * sizes.heads) - freed
    if recompute == "selective":
        return max(activation, again + attention)
    return again + max(activation, attention)


def _deferred(sizes: _Sizes, block: float, recompute: Recompute) -> float:
    """The gradients of the outputs of linear layers and norms, for which their weights wait; with recompute=full what was
    recomputed too, which they need again."""
    again = block + sizes.core - sizes.residual if recompute == "full" else 0.0
    return 3 * sizes.heads + sizes.features + 2 * sizes.input + 2 * sizes.residual + again


def _head(
    model: ModelConfig, length: int, tokens: float, predicted_tokens: float | None, tensor: int, item: tuple[int, int]
) -> tuple[float, float]:
    """Bytes that the head saves, and the logits among them."""
    shape, (wide, narrow) = shape_of(model), item
    if model.family == "gpt":
        predicted, each = tokens, (wide + narrow) * shape.hidden_size
    else:
        predicted = _predicted(length, predicted_tokens) * tokens / length
        each = (wide + 3 * narrow) * shape.hidden_size
    logits = narrow * shape.vocab_size / tensor * predicted
    return each * predicted + logits, logits


def passing_bytes(
    model: ModelConfig, sequence_length: int, micro_batch_size: int, precision: Precision, tensor: int, sequence: bool,
    context: int,
) -> float:  # fmt: skip
    """Hidden states of a micro-batch between two pipeline stages: w H of each token that a rank holds between matrices."""
    tokens = sequence_length * micro_batch_size / context / (tensor if sequence else 1)
    return _wide_bytes(precision) * model.hidden_size * tokens


def _predicted(sequence_length: int, predicted_tokens: float | None) -> float:
    return DataConfig().mlm_probability * sequence_length if predicted_tokens is None else predicted_tokens


def _wide_bytes(precision: Precision) -> int:
    return 8 if precision == "fp64" else 4
