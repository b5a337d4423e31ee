"""Seconds of attention on one rank: the fused kernel, plain products, the ring, or Ulysses. No torch.

Letters as in `disttrain.planner.work`; E scores of a rank. The passes over scores are those of `disttrain.models.layers` and
`disttrain.parallel.ring`.
"""

from typing import TYPE_CHECKING, NamedTuple

from disttrain.config.presets import shape_of
from disttrain.config.schema import Config
from disttrain.planner.collectives import all_to_all, exposed, send
from disttrain.planner.execution import Execution
from disttrain.planner.kernels import Kernels

if TYPE_CHECKING:
    from disttrain.planner.work import Cut

UNFUSED_SEQUENCE = 512
"""As `disttrain.models.layers.UNFUSED_SEQUENCE`: half precision on a CPU is multiplied plainly up to here."""


class Looked(NamedTuple):
    """Seconds of one block's attention for a micro-batch."""

    forward_compute: float
    backward_compute: float
    forward_exposed: float = 0.0
    """Waiting for context parallelism's messages."""
    backward_exposed: float = 0.0


def of(config: Config, cut: "Cut", kernels: Kernels, execution: Execution) -> Looked:
    """This layout's."""
    length, heads = config.data.sequence_length, shape_of(config.model).heads // cut.tensor.ranks
    if cut.context.ranks == 1:
        return _whole(config, length, cut.micro_batch * heads, kernels, execution)
    if not cut.ulysses:
        return _ring(config, cut, heads, kernels, execution)
    inner = _whole(config, length, cut.micro_batch * heads // cut.context.ranks, kernels, execution)
    features = shape_of(config.model).attention_size // cut.tensor.ranks
    each = execution.narrow * features * cut.tokens(length)
    messages = all_to_all(cut.context, 3 * each) + all_to_all(cut.context, each)
    copies = kernels.passes(4 * 3 * 2 * each)  # cut, joined and put in order, of four tensors
    return Looked(inner.forward_compute + copies, inner.backward_compute + copies, messages, messages)


def _whole(config: Config, length: int, heads: int, kernels: Kernels, execution: Execution) -> Looked:
    """Over whole sequences; `heads` of all sequences of the micro-batch together."""
    shape = shape_of(config.model)
    size, causal, c = shape.head_size, config.model.family == "gpt", execution.narrow
    plain = not kernels.speeds.accelerator and c == 2 and length <= UNFUSED_SEQUENCE
    if not execution.fused_attention or plain:
        return _plain(config, length, size, heads, kernels, execution)
    pairs = length * (length + 1) / 2 if causal else length**2
    if kernels.speeds.attention:
        forward, backward = kernels.attention(length, size)
        return Looked(4 * size * pairs * heads / forward, 10 * size * pairs * heads / backward)
    seen, scores, wide = pairs / length**2, heads * pairs, max(4, c)
    product = kernels.product(length, length, size, heads) * seen
    other = kernels.product(length, size, length, heads) * seen
    return Looked(
        product + other + kernels.passes(2 * wide * scores), 2 * product + 3 * other + kernels.passes(4 * wide * scores)
    )


def _plain(config: Config, length: int, size: int, heads: int, kernels: Kernels, execution: Execution) -> Looked:
    """Scores in memory, the whole square of them: product with bias 2 c E, softmax 2 c E and 3 c E back, and dropout's."""
    c, scores, dropout = execution.narrow, heads * length**2, config.model.dropout > 0
    product, other = kernels.product(length, length, size, heads), kernels.product(length, size, length, heads)
    there = 4 * c + (execution.mask_bytes + 1 + 4 * c if dropout else 0)
    back = 3 * c + (1 + 4 * c if dropout else 0)
    return Looked(product + other + kernels.passes(there * scores), product + 3 * other + kernels.passes(back * scores))


def _ring(config: Config, cut: "Cut", heads: int, kernels: Kernels, execution: Execution) -> Looked:
    """As many rounds as ranks, of half the square of a rank's tokens each if causal, by plain products in low precision and
    passes in fp32 (x bytes): 8 x + 2 c of each score forward, 16 x + 5 c back. Keys and values travel while a round is
    computed; back, their gradients in fp32 follow them."""
    shape, ranks = shape_of(config.model), cut.context.ranks
    own, size, c = config.data.sequence_length // ranks, shape.head_size, execution.narrow
    wide, count = max(4, c), cut.micro_batch * heads
    seen = own // 2 if config.model.family == "gpt" else own
    scores = count * own * seen
    extra = execution.mask_bytes + 3 * wide if config.model.dropout else 0
    product, other = kernels.product(own, seen, size, count), kernels.product(own, size, seen, count)
    there = product + other + kernels.passes((8 * wide + 2 * c + extra) * scores)
    back = 2 * product + 3 * other + kernels.passes((16 * wide + 5 * c + 2 * extra) * scores)
    keys = 2 * count * own * size
    forward = (ranks - 1) * exposed(cut.context, send(cut.context, c * keys), there)
    both = send(cut.context, c * keys) + send(cut.context, wide * keys)
    backward = (ranks - 1) * exposed(cut.context, both, back) + send(cut.context, wide * keys)
    return Looked(ranks * there, ranks * back, forward, backward)
