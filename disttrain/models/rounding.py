"""Linear layers and embeddings whose weights and inputs are rounded as int8 rounds them, while they are trained.

The same two functions say what numbers the int8 layers of `disttrain.model_compression` multiply. Quantisation-aware
training as in Jacob et al. 2018, section 3; the rounding's gradient is that of the identity, the straight-through
estimator (Bengio et al. 2013).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_STEPS, INPUT_STEPS = 127, 63
"""Steps from 0 to the largest magnitude: of weights int8's, of inputs a bit less, so that no CPU's sums of two products
of bytes overflow 16 bits (those without VNNI instructions saturate there)."""


class _Rounded(torch.autograd.Function):
    """x rounded to whole multiples of its scale; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """x and scale broadcast."""
        return (x / scale).round() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """That of the identity."""
        return gradients[0], None


def row_scales(x: Tensor, steps: int) -> Tensor:
    """[..., K] -> [..., 1]: each row's largest magnitude / steps, which is the distance of two values; 1 of zeros."""
    scale = x.detach().abs().amax(-1, keepdim=True) / steps
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def rounded_rows(x: Tensor, steps: int) -> Tensor:
    """Each row [K] of x rounded to `steps` equal steps from 0 to its largest magnitude, symmetric; same shape and type."""
    return _Rounded.apply(x, row_scales(x, steps))  # pyright: ignore[reportReturnType]


def round_in_training(model: nn.Module) -> None:
    """Let every linear layer and embedding of a model, or of a stage of it, compute with rounded numbers; in place.

    Weights have one scale a row, which is one an output feature or a token; inputs one a position, so that neither
    micro-batches nor layouts change it. Names and parameters stay.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _RoundedLinear(module)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, nn.Embedding):
            module.forward = _RoundedEmbedding(module)  # pyright: ignore[reportAttributeAccessIssue]


class _RoundedLinear:
    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        weight = rounded_rows(self.module.weight, WEIGHT_STEPS)
        return F.linear(rounded_rows(x, INPUT_STEPS), weight, self.module.bias)


class _RoundedEmbedding:
    def __init__(self, module: nn.Embedding):
        self.module = module

    def __call__(self, ids: Tensor) -> Tensor:
        return rounded_rows(F.embedding(ids, self.module.weight), WEIGHT_STEPS)
