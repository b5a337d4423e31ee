"""How many parameters a model has (no torch). Letters as in `disttrain.costs`."""

from math import prod
from typing import NamedTuple

from disttrain import task_shapes
from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig


class ParameterCount(NamedTuple):
    """Parameters of a model; the tied decoder counts once, as an embedding."""

    embedding: int
    """Token, position and token-type embeddings."""
    non_embedding: int
    """Blocks, norms and heads."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.non_embedding


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Exact parameter count.

    A block has 4 H E + 2 H F weights, 3 E + 2 H + F biases and 4 H norm parameters. GPT adds a final norm (2 H); BERT an
    embedding norm (2 H), the masked-token head (H^2 + H, norm 2 H, decoder bias V), the pooler (H^2 + H) and the
    next-sentence head (2 H + 2). Heads of tasks and small encoders: `disttrain.task_shapes`.
    """
    shape = shape_of(model)
    if task_shapes.is_small(model):
        parts = task_shapes.encoder_shapes(model)
        embedding = prod(parts["embed.tokens.weight"])
        return ParameterCount(embedding, task_shapes.elements(parts | task_shapes.head_shapes(model)) - embedding)
    h, e, f, v = shape.hidden_size, shape.attention_size, shape.ffn_hidden_size, shape.vocab_size
    blocks = shape.layers * (4 * h * e + 2 * h * f + 3 * e + 2 * h + f + 4 * h)
    if model.head != "lm":
        blocks += task_shapes.elements(task_shapes.head_shapes(model)) - (2 * h if model.family == "gpt" else 0)
    if model.family == "gpt":
        return ParameterCount((v + shape.max_positions) * h, blocks + 2 * h)
    heads = 0 if model.head != "lm" else (h * h + h) + 2 * h + v + (h * h + h) + (2 * h + 2)
    return ParameterCount((v + shape.max_positions + 2) * h, blocks + 2 * h + heads)
