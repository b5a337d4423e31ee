"""Structured pruning: whole heads, feed-forward neurons and layers leave the model, whose matrices get smaller.

Every layer loses equally many, which ones is its own matter: the result is a model of the same kind with other sizes,
that every layout trains. Heads keep their width, so that `model.head_size` is part of the new shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.model_compression.importance import Importance


@dataclass(frozen=True)
class Kept:
    """What stays, by number, ascending."""

    layers: list[int]
    heads: dict[int, list[int]]
    """Of each layer that stays."""
    neurons: dict[int, list[int]]
    """Of each layer that stays."""


def choose(config: ModelConfig, importance: Importance, layers: int, heads: int, neurons: int) -> Kept:
    """The most important `layers`, and in each of these the most important `heads` and `neurons`.

    Of equals the first stay. Raises ValueError for more than there are, or none.
    """
    shape = shape_of(config)
    for what, wanted, there in (("layers", layers, shape.layers), ("heads", heads, shape.heads),
                                ("ffn_hidden_size", neurons, shape.ffn_hidden_size)):  # fmt: skip
        if not 0 < wanted <= there:
            raise ValueError(f"{wanted} {what} cannot stay of {there}")
    stay = _largest(importance.layers, layers)
    return Kept(
        stay,
        {number: _largest(importance.heads[number], heads) for number in stay},
        {number: _largest(importance.neurons[number], neurons) for number in stay},
    )


def _largest(values: Tensor, count: int) -> list[int]:
    order = torch.sort(values, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def shrunk_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The shape of what stays."""
    size, first = shape_of(config).head_size, kept.layers[0]
    heads = len(kept.heads[first])
    return config.model_copy(update={
        "preset": None,
        "layers": len(kept.layers),
        "heads": heads,
        "head_size": size if heads * size != config.hidden_size else None,
        "ffn_hidden_size": len(kept.neurons[first]),
    })  # fmt: skip


def shrink(config: ModelConfig, weights: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The parameters of what stays, contiguous copies under the names of the smaller model; `weights` has whole ones.

    Raises KeyError for a name that is missing.
    """
    size = shape_of(config).head_size
    found = {name: value.clone() for name, value in weights.items() if not name.startswith("blocks.")}
    for number, old in enumerate(kept.layers):
        heads, neurons = torch.tensor(kept.heads[old]), torch.tensor(kept.neurons[old])
        columns = _spans(heads, size)
        cut = {
            "attn.qkv.weight": (0, _spans(heads, 3 * size)),
            "attn.qkv.bias": (0, _spans(heads, 3 * size)),
            "attn.out.weight": (1, columns),
            "mlp.up.weight": (0, neurons),
            "mlp.up.bias": (0, neurons),
            "mlp.down.weight": (1, neurons),
        }
        prefix = f"blocks.{old}."
        for name in [name for name in weights if name.startswith(prefix)]:
            leaf, value = name.removeprefix(prefix), weights[name]
            found[f"blocks.{number}.{leaf}"] = value.index_select(*cut[leaf]) if leaf in cut else value.clone()
    return found


def _spans(numbers: Tensor, size: int) -> Tensor:
    """Rows of the blocks of `size` with these numbers."""
    return (numbers[:, None] * size + torch.arange(size)).flatten()
