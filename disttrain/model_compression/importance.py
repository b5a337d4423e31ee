"""How much heads, feed-forward neurons and layers matter: by the size of their weights, or by what the loss says.

Shapes: L layers, A heads, D head size, F feed-forward width, H hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models import Model


@dataclass(frozen=True)
class Importance:
    """One number, float64, for everything that can be removed; what has the smallest goes first."""

    heads: Tensor
    """[L, A]."""
    neurons: Tensor
    """[L, F]."""
    layers: Tensor
    """[L]."""


def by_magnitude(config: ModelConfig, weights: Mapping[str, Tensor]) -> Importance:
    """2-norms of weights (Han et al. 2015; Li et al. 2017 for whole structures).

    Of a head: its rows of qkv, with their biases, and its columns of out. Of a neuron: its row of up, with its bias, and
    its column of down. Of a layer: what writes into the residual stream, out and down.
    """

    def of_layer(number: int) -> tuple[Tensor, Tensor, Tensor]:
        qkv, out, up, down = (_pair(weights, number, name) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down"))
        heads = _by_head(qkv[0].square().sum(1) + qkv[1].square(), config, 3)
        heads = heads + _by_head(out[0].square().sum(0), config, 1)
        neurons = up[0].square().sum(1) + up[1].square() + down[0].square().sum(0)
        layer = sum((t.square().sum() for t in (*out, *down)), torch.zeros((), dtype=torch.float64))
        return heads, neurons, layer

    return _stacked(of_layer(number) for number in range(config.layers)).rooted()


def by_taylor(model: Model, batches: Iterable[Mapping[str, Tensor]]) -> Importance:
    """What the loss would change, to first order, if a part's output were scaled by 1 - e: |sum of g w|, over e.

    The sum is over the weights that carry the part's output into the residual stream, columns of out or down (out, down
    and their biases for a layer), which is the derivative by a gate on that output: exactly the heads' importance of
    Michel et al. 2019, section 4.1, and the group criterion of Molchanov et al. 2019, equation 8, without its square.
    g is the gradient of the mean loss of a batch; magnitudes are averaged over batches. Gradients are left empty.
    Raises ValueError without batches.
    """
    config, total, count = model.config, None, 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for batch in batches:
        model.zero_grad(set_to_none=True)
        losses = model.loss(dict(batch)).values()
        torch.stack([loss.sum / loss.count.clamp(min=1) for loss in losses]).sum().backward()
        products = {n: (p * p.grad).detach().double() for n, p in model.named_parameters() if p.grad is not None}
        found = _gates(config, products)
        total, count = found if total is None else total.plus(found), count + 1
    model.zero_grad(set_to_none=True)
    for module, mode in modes:
        module.training = mode
    if total is None:
        raise ValueError("importance by gradients needs at least one batch")
    return Importance(*(sums / count for sums in (total.heads, total.neurons, total.layers)))


def _gates(config: ModelConfig, products: Mapping[str, Tensor]) -> "_Sums":
    """|derivatives| by gates, from g w of every parameter."""

    def of_layer(number: int) -> tuple[Tensor, Tensor, Tensor]:
        out, down = (_pair(products, number, name) for name in ("attn.out", "mlp.down"))
        heads = _by_head(out[0].sum(0), config, 1)
        layer = sum((t.sum() for t in (*out, *down)), torch.zeros((), dtype=torch.float64))
        return heads.abs(), down[0].sum(0).abs(), layer.abs()

    return _stacked(of_layer(number) for number in range(config.layers))


@dataclass(frozen=True)
class _Sums:
    heads: Tensor
    neurons: Tensor
    layers: Tensor

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(self.heads + other.heads, self.neurons + other.neurons, self.layers + other.layers)

    def rooted(self) -> Importance:
        return Importance(self.heads.sqrt(), self.neurons.sqrt(), self.layers.sqrt())


def _stacked(layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> _Sums:
    heads, neurons, whole = zip(*layers, strict=True)
    return _Sums(torch.stack(heads), torch.stack(neurons), torch.stack(whole))


def _pair(tensors: Mapping[str, Tensor], number: int, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer of a block, float64."""
    weight, bias = (tensors[f"blocks.{number}.{name}.{leaf}"].double() for leaf in ("weight", "bias"))
    return weight, bias


def _by_head(values: Tensor, config: ModelConfig, each: int) -> Tensor:
    """[A * each * D] -> [A]: rows of qkv are [A, 3, D], columns of out [A, D]."""
    return values.view(config.heads, each * shape_of(config).head_size).sum(1)
