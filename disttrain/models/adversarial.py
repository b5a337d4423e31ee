"""Adversarial training: perturbed embeddings, and features that do not tell domains apart.

Shapes: B batch, S sequence, H embedding size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.models.layers import LossSum
from disttrain.models.losses import widened


@torch.no_grad()
def perturbation(gradient: Tensor, epsilon: float, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """r = epsilon g / ||g|| of each example: gradients [B, ...] of a summed loss -> [B, ...] of their type.

    The fast gradient method of Miyato et al. (2017, equation 5) on the embedded words of a sequence. The norm is of all
    of an example, and of no other one: however a batch is cut, an example moves alike, whatever the loss is divided or
    scaled by. It is computed in float64. An example without a gradient stays where it is. `reduce` gives the sum of
    squares, float64 [B], over the ranks that hold other positions of the same examples.
    """
    g = gradient.double()
    squares = g.flatten(1).square().sum(1)
    norm = (squares if reduce is None else reduce(squares)).sqrt().view(-1, *[1] * (g.ndim - 1))
    return torch.where(norm > 0, epsilon * g / norm, 0).to(gradient.dtype)


def with_adversaries(
    embed: nn.Module, loss: Callable[[], LossSum], epsilon: float, weight: float = 1.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> LossSum:  # fmt: skip
    """The loss plus `weight` times the loss of the same batch with perturbed embeddings; the count is of the first.

    `loss` computes the loss anew at each call, and `embed`, called once in it, gives the embedded words [B, S, H].
    Between the two calls the gradient by its output is taken, which leaves the parameters' gradients alone; `reduce` is
    that of `perturbation`. Masks of dropout must be the same in both, as those of `disttrain.models.dropout` are. With
    the perturbation held constant this is L + weight * L_adv of Miyato et al. (2017, equation 6). Raises ValueError when
    `embed` is called more or less than once.
    """
    with _outputs(embed) as seen:
        clean = loss()
    if len(seen) != 1:
        raise ValueError(f"the embedding was called {len(seen)} times, not once")
    if not seen[0].requires_grad:  # where no gradients are wanted at all
        return clean
    (gradient,) = torch.autograd.grad(clean.sum, seen[0], retain_graph=True)
    with moved(embed, perturbation(gradient, epsilon, reduce)):
        adversarial = loss()
    return LossSum(clean.sum + weight * adversarial.sum, clean.count)


@contextmanager
def moved(module: nn.Module, by: Tensor) -> Iterator[None]:
    """Within the block a module's output is moved by a constant tensor of its shape."""

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + by

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of the module in the block; those of frozen weights get a gradient of their own."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        seen.append(output)
        return output

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def normalised_embeddings(weight: Tensor, frequencies: Tensor) -> Tensor:
    """Embeddings [V, H] with mean 0 and variance 1 of each feature over words as frequent as they are (frequencies [V]).

    Otherwise a model escapes a perturbation of a given length by longer embeddings (Miyato et al. 2017, equation 1). The
    gradient goes through mean and variance.
    """
    wide = widened(weight)
    share = (frequencies.to(wide) / frequencies.to(wide).sum())[:, None]
    centred = wide - (share * wide).sum(0)
    return (centred / (share * centred.square()).sum(0).sqrt()).to(weight.dtype)


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; the gradient comes back times -factor (Ganin et al. 2016, equations 18 and 19).

    Between features and a classifier of domains, which learns to tell domains apart while the features unlearn it.
    """
    return _ReversedGradient.apply(x, factor)  # pyright: ignore[reportReturnType]


class _ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grads[0], None


def reversal_factor(progress: float, steepness: float = 10.0) -> float:
    """lambda = 2 / (1 + exp(-steepness p)) - 1 at the share p of the training that is done (Ganin et al. 2016, sec. 5.2.2).

    From 0 to almost 1. Raises ValueError for a progress outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is outside 0 to 1")
    return 2 / (1 + math.exp(-steepness * progress)) - 1
