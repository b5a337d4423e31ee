"""Muon (Jordan et al. 2024): the momentum of a hidden weight, made nearly orthogonal; AdamW for everything else."""

import math

import torch
from torch import Tensor

from disttrain.optim.adam import denominators, directions, learn, no_moments
from disttrain.optim.parts import WHOLE, Parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial, its author's: singular values come near 1 quickly, and stay within about 0.7 and 1.2."""
SMALLEST_NORM = 1e-7
RMS = 0.2
"""Root mean square of an update of AdamW's, which Muon's is scaled to (Liu et al. 2025, section 2.2), so that one learning
rate and decay are right for both."""


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal` are matrices that it steps on; the others are AdamW's.

    Momentum is averaged and may look ahead, as in torch's class. That one orthogonalises the part that it is given, in
    bfloat16, whose rounding depends on the last bits of what it rounds, so that two layouts would part. Here whole matrices
    are gathered, and multiplied in their own type. A `fused` matrix, whose rows are laid out [heads, fused, head size], is
    taken apart, as the author advises for queries, keys and values.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float, nesterov: bool,
        ns_steps: int, parts: Parts = WHOLE,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "momentum": momentum,
                    "nesterov": nesterov, "ns_steps": ns_steps, "orthogonal": False, "fused": 1, "heads": 1}  # fmt: skip
        super().__init__(groups, defaults)
        self._parts = parts
        self._hidden = {p for group in self.param_groups if group["orthogonal"] for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._orthogonal if group["orthogonal"] else self._adamw)(parameters, group)

    def _orthogonal(self, parameters: list[Tensor], group: dict) -> None:
        for p in parameters:
            assert p.grad is not None
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            whole = self._parts.gathered(p, update)
            size = max(len(whole) // group["fused"], whole.shape[1])
            found = _each_orthogonal(whole, group)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(found[self._parts.slices(p)].to(p.device), alpha=group["lr"] * RMS * math.sqrt(size))

    def _adamw(self, parameters: list[Tensor], group: dict) -> None:
        learn(self.state, parameters, group["betas"], "exp_avg_sq")
        steps = [self.state[p]["step"] for p in parameters]
        below = denominators(self.state, parameters, "exp_avg_sq", steps, group["betas"][1], group["eps"])
        updates = directions(self.state, parameters, below, group["betas"][0])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, updates, alpha=group["lr"])

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state that a parameter starts from."""
        if parameter in self._hidden:
            return {"momentum_buffer": torch.zeros_like(parameter)}
        return no_moments(parameter)


def _each_orthogonal(whole: Tensor, group: dict) -> Tensor:
    """A matrix, or each of those that are fused in it, made orthogonal."""
    if group["fused"] == 1:
        return orthogonal(whole, group["ns_steps"])
    rows = whole.view(group["heads"], group["fused"], -1, whole.shape[1])
    found = [orthogonal(each.flatten(0, 1), group["ns_steps"]).view_as(each) for each in rows.unbind(1)]
    return torch.stack(found, 1).view_as(whole)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The matrix [n, m] with its singular values brought near 1 by so many Newton-Schulz steps.

    X <- a X + (b X X^T + c (X X^T)^2) X, from the matrix divided by its Frobenius norm (Jordan et al. 2024).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
