"""Seconds of a block, the embedding and the head of one micro-batch on one rank, operator by operator. No torch.

Letters: T tokens of a rank (micro-batch x S / context ranks), H hidden size, F feed-forward width, V vocabulary, A heads,
E width of all heads together, t tensor ranks, d = E / A; r, c, w bytes of an element of the residual stream, of what is
multiplied, of a master weight (`Execution`). A pass over n elements that reads a and writes b
bytes of each counts (a + b) n. docs/planner.md has the list.
"""

from typing import NamedTuple

from disttrain.config.presets import shape_of
from disttrain.config.schema import Config
from disttrain.planner import attention
from disttrain.planner.collectives import Ring, all_gather, all_reduce, exposed, reduce_scatter
from disttrain.planner.execution import Execution
from disttrain.planner.kernels import Kernels

FORWARD_OPERATORS, BACKWARD_OPERATORS = 26, 44
"""Of a block, as torch dispatches them: products, passes, and views that cost the host alone."""


class Cost(NamedTuple):
    """Seconds of one rank: computing, and waiting for messages of an axis that nothing hides."""

    compute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.compute + self.tensor + self.context


def added(*costs: Cost) -> Cost:
    """One after the other."""
    compute = tensor = context = 0.0
    for cost in costs:
        compute += cost.compute
        tensor += cost.tensor
        context += cost.context
    return Cost(compute, tensor, context)


def times(cost: Cost, count: float) -> Cost:
    """So many of them."""
    return Cost(count * cost.compute, count * cost.tensor, count * cost.context)


class Both(NamedTuple):
    """The two directions."""

    forward: Cost
    backward: Cost


class Cut(NamedTuple):
    """How a layout cuts what one rank computes of a micro-batch."""

    micro_batch: int
    """Sequences."""
    tensor: Ring
    sequence: bool
    context: Ring
    ulysses: bool

    def tokens(self, sequence_length: int) -> int:
        """T."""
        return self.micro_batch * sequence_length // self.context.ranks


def block(config: Config, cut: Cut, kernels: Kernels, execution: Execution) -> Both:
    """One transformer layer, whatever is recomputed (`parallel.recompute`) included in its backward pass."""
    shape, recompute = shape_of(config.model), config.parallel.recompute
    h, f, t = shape.hidden_size, shape.ffn_hidden_size, cut.tensor.ranks
    e, tokens = shape.attention_size, cut.tokens(config.data.sequence_length)
    linears = [(tokens, 3 * e // t, h), (tokens, h, e // t), (tokens, f // t, h), (tokens, h, f // t)]
    forward, input_gradient, weight_gradient = ([] for _ in range(3))
    for m, n, k in linears:
        forward.append(kernels.product(m, n, k, 1))
        input_gradient.append(kernels.product(m, k, n, 1))
        weight_gradient.append(kernels.product(n, k, m, 1))
    there, back = _passes(config, cut, execution, tokens)
    messages = _tensor_messages(cut, execution.narrow * h * tokens)
    looked = attention.of(config, cut, kernels, execution)
    forward_cost = Cost(
        kernels.together(sum(forward) + kernels.passes(there) + looked.forward_compute, FORWARD_OPERATORS),
        _forward_tensor(cut, messages, forward, execution),
        looked.forward_exposed,
    )
    busy = sum(input_gradient) + sum(weight_gradient) + kernels.passes(back) + looked.backward_compute
    backward_cost = Cost(
        kernels.together(busy, BACKWARD_OPERATORS),
        _backward_tensor(cut, messages, input_gradient, weight_gradient),
        looked.backward_exposed,
    )
    if recompute == "selective":
        backward_cost = added(backward_cost, Cost(looked.forward_compute, 0.0, looked.forward_exposed))
    if recompute == "full":
        backward_cost = added(backward_cost, forward_cost)
        if config.model.family == "gpt" and config.model.dropout == 0:  # nothing needs the last product again
            last = messages.scatter if cut.sequence else messages.reduce
            hidden = exposed(cut.tensor, last, forward[-1]) if execution.overlaps_tensor else last
            backward_cost = added(backward_cost, Cost(-forward[-1], -hidden, 0.0))
    return Both(forward_cost, backward_cost)


class _Messages(NamedTuple):
    """Seconds of tensor parallelism's collectives over the hidden states of a micro-batch."""

    gather: float
    scatter: float
    reduce: float


def _tensor_messages(cut: Cut, whole_bytes: float) -> _Messages:
    group = cut.tensor
    return _Messages(all_gather(group, whole_bytes), reduce_scatter(group, whole_bytes), all_reduce(group, whole_bytes))


def _forward_tensor(cut: Cut, messages: _Messages, products: list[float], execution: Execution) -> float:
    """Before qkv and up the positions are gathered, after out and down they are scattered; without sequence parallelism the
    latter are summed."""
    before, after = (messages.gather, messages.scatter) if cut.sequence else (0.0, messages.reduce)
    if not execution.overlaps_tensor:
        return 2 * (before + after)
    return sum(
        exposed(cut.tensor, before if i % 2 == 0 else after, product) for i, product in enumerate(products)
    )  # qkv and up, out and down


def _backward_tensor(cut: Cut, messages: _Messages, inputs: list[float], weights: list[float]) -> float:
    """As `disttrain.parallel.tensor`: the gradients of an input are summed while those of the weight are computed. With
    sequence parallelism a column layer gathers its input again meanwhile, and a row layer its output's gradient before."""
    waits = 0.0
    for column in (0, 2):
        if cut.sequence:
            waits += exposed(cut.tensor, messages.gather, inputs[column])
            waits += exposed(cut.tensor, messages.scatter, weights[column])
        else:
            waits += exposed(cut.tensor, messages.reduce, weights[column])
    return waits + (2 * messages.gather if cut.sequence else 0.0)


def _passes(config: Config, cut: Cut, execution: Execution, tokens: int) -> tuple[float, float]:
    """Bytes that a block's elementwise operators and norms move, forward and backward; attention's are in `attention`.

    Forward, twice each: norm 2 r, cast r + c, sum with the residual stream 2 r + c, of the H features of a token (1 / t
    of the tokens with sequence parallelism); copy of the heads' output 2 c E / t; GELU 2 c F / t; the bias of a row
    layer 2 c H. Backward: cast of the branch's gradient r + c, and back c + r, norm 5 r, sum of the two branches 3 r;
    biases c of what they are added to; heads 8 c E / t; GELU 3 c F / t. Fused: norm, cast and sum are one pass of 2 r +
    2 c, 3 r + 2 c back.
    """
    shape, t = shape_of(config.model), cut.tensor.ranks
    h, e, f = shape.hidden_size, shape.attention_size, shape.ffn_hidden_size
    r, c = execution.residual, execution.narrow
    cast = 0 if r == c else r + c
    between = tokens / t if cut.sequence else tokens
    if execution.fused:
        there, back = 2 * r + 2 * c, 3 * r + 2 * c
    else:
        there, back = 2 * r + cast + 2 * r + c, 2 * cast + 5 * r + 3 * r
    rows = 0 if t == 1 else 2 * 2 * c * h * between
    dropped = 0.0
    if config.model.dropout:
        dropped = 2 * (execution.mask_bytes + 1 + 4 * c) * h * between
    forward = 2 * there * h * between + (2 * c * e + 2 * c * f) / t * tokens + rows + dropped
    biases = c * (3 * e + f) / t * tokens + 2 * c * h * between
    backward = 2 * back * h * between + (8 * c * e + 3 * c * f) / t * tokens + biases
    return forward, backward + (2 * (1 + 4 * c) * h * between if config.model.dropout else 0.0)


def embedding(config: Config, cut: Cut, kernels: Kernels, execution: Execution) -> Both:
    """Rows looked up and positions added, in master precision: 5 w H of every token, and w H of every row held back, where
    the gradient is a whole matrix. Over tensor ranks rows that are elsewhere are zeros, and are summed."""
    shape, t, w = shape_of(config.model), cut.tensor.ranks, execution.master
    h, tokens = shape.hidden_size, cut.tokens(config.data.sequence_length)
    tables = 3 if config.model.family == "bert" else 2
    there = (2 + 3 * (tables - 1)) * w * h * tokens + (2 * w * h * tokens if t > 1 else 0)
    if config.model.family == "bert":
        there += 2 * w * h * tokens
    if config.model.dropout:
        there += (execution.mask_bytes + 1 + 4 * w) * h * tokens
    back = tables * 3 * w * h * tokens + w * h * shape.vocab_size / t
    summed = all_reduce(cut.tensor, w * h * tokens)
    gathered = all_gather(cut.tensor, w * h * tokens) if cut.sequence else 0.0
    return Both(
        Cost(kernels.together(kernels.passes(there), 12), summed, 0.0),
        Cost(kernels.together(kernels.passes(back), 12), gathered, 0.0),
    )


def head(config: Config, cut: Cut, kernels: Kernels, execution: Execution, predicted: float) -> Both:
    """Final norm, the product with the vocabulary and the loss over `predicted` tokens of a rank; a BERT's transform.

    The loss widens the logits to at least fp32 (x bytes) a part at a time: it moves, of each logit, c + x and 4 x forward,
    and 2 c + 6 x back (`disttrain.models.cross_entropy`).
    """
    shape, t = shape_of(config.model), cut.tensor.ranks
    h, v = shape.hidden_size, -(-shape.vocab_size // t)
    r, c = execution.residual, execution.narrow
    wide, tokens = max(4, c), round(predicted)
    products = [(tokens, v, h)] + ([(tokens, h, h)] if config.model.family == "bert" else [])
    forward = sum(kernels.product(m, n, k, 1) for m, n, k in products)
    inputs = sum(kernels.product(m, k, n, 1) for m, n, k in products)
    weights = sum(kernels.product(n, k, m, 1) for m, n, k in products)
    cast = 0 if r == c else r + c
    there = (2 * r + cast) * h * tokens + (4 * wide + (c + wide if c < wide else 0)) * v * tokens
    back = (cast + 5 * r) * h * tokens + (2 * c + 6 * wide) * v * tokens
    joined = all_gather(cut.tensor, r * h * cut.tokens(config.data.sequence_length)) if cut.sequence else 0.0
    told = all_gather(cut.tensor, 8 * tokens * t)
    summed = exposed(cut.tensor, all_reduce(cut.tensor, c * h * tokens), weights)
    return Both(
        Cost(kernels.together(forward + kernels.passes(there), 30), joined + told, 0.0),
        Cost(kernels.together(inputs + weights + kernels.passes(back), 30), summed, 0.0),
    )
