"""LAMB, and its relative whose second moments can be frozen."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disttrain.optim.adam import denominators, directions, forget, freeze, learn
from disttrain.optim.parts import Across, alone

MIN_COEFFICIENT, MAX_COEFFICIENT = 0.01, 10.0
"""Bounds of a trust ratio in the warm-up of 1-bit LAMB: these are the values of the paper's authors, as all that follow."""
COEFFICIENT_BETA = 0.9
"""Decay of the trust ratio's moving average."""
MIN_FACTOR, MAX_FACTOR, FACTOR_CHANGE = 0.5, 4.0, 0.1
"""Bounds of what the average is multiplied by after the warm-up, and the share by which this may change in a step."""


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2): AdamW's direction, decay included, times the trust ratio |weights| / |direction|
    of each parameter, 1 where either is zero.

    Norms are of whole parameters. What does not decay, biases and layer normalisation, has no ratio either, as in the
    authors' code.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, across: Across = alone
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._across = across

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                updates = self._updates(parameters, group)
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _updates(self, parameters: list[Tensor], group: dict) -> list[Tensor]:
        learn(self.state, parameters, group["betas"], "exp_avg_sq")
        steps = [self.state[p]["step"] for p in parameters]
        below = denominators(self.state, parameters, "exp_avg_sq", steps, group["betas"][1], group["eps"])
        updates = directions(self.state, parameters, below, group["betas"][0])
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if parameters[0].ndim > 1:
            torch._foreach_mul_(updates, self._coefficients(parameters, updates))
        return updates

    def _coefficients(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        return trust_ratios(parameters, updates, self._across)


class OneBitLamb(Lamb):
    """LAMB that goes on with what it has learned of each layer while it is `frozen` (Li et al. 2021, algorithm 1).

    Before, trust ratios are bounded, and averaged over the steps; the average begins with the first one. After, second
    moments and average stay. Fresh second moments go on learning, and the average is multiplied by the largest ratio of
    frozen to fresh denominators in the layer.
    """

    frozen = False
    MORE = ("frozen_step", "coefficient", "factor", "exp_avg_sq_fresh")
    """State beside AdamW's. Vectors have the first only."""

    def _updates(self, parameters: list[Tensor], group: dict) -> list[Tensor]:
        if not self.frozen:
            forget(self.state, ("frozen_step", "factor", "exp_avg_sq_fresh"))
            return super()._updates(parameters, group)
        matrices = parameters[0].ndim > 1
        (beta1, beta2), eps = group["betas"], group["eps"]
        seen = freeze(self.state, parameters)
        for state in (self.state[p] for p in parameters if matrices):
            if "exp_avg_sq_fresh" not in state:
                state["exp_avg_sq_fresh"] = state["exp_avg_sq"].clone()
                state["factor"] = state["exp_avg"].new_ones(())
        learn(self.state, parameters, group["betas"], "exp_avg_sq_fresh" if matrices else None)
        below = denominators(self.state, parameters, "exp_avg_sq", seen, beta2, eps)
        fresh: list[Tensor] = []
        if matrices:
            steps = [self.state[p]["step"] for p in parameters]
            fresh = denominators(self.state, parameters, "exp_avg_sq_fresh", steps, beta2, eps)
            torch._foreach_div_(fresh, below)
        updates = directions(self.state, parameters, below, beta1, frozen=True)
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if matrices:
            if any("coefficient" not in self.state[p] for p in parameters):  # these weights come from elsewhere
                self._coefficients(parameters, updates)
            torch._foreach_mul_(updates, self._frozen_coefficients(parameters, fresh))
        return updates

    def _coefficients(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Of the warm-up."""
        ratios = [r.clamp(MIN_COEFFICIENT, MAX_COEFFICIENT) for r in super()._coefficients(parameters, updates)]
        for parameter, ratio in zip(parameters, ratios, strict=True):
            state = self.state[parameter]
            state["coefficient"] = ratio.lerp(state.get("coefficient", ratio), COEFFICIENT_BETA)
        return ratios

    def _frozen_coefficients(self, parameters: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """`fresh` denominators, divided by the frozen ones."""
        least = [f.min() if f.numel() else f.new_tensor(math.inf) for f in fresh]
        ratios = self._across(parameters, 1 / torch.stack(least).unsqueeze(0), "max")[0]
        found = []
        for parameter, ratio in zip(parameters, ratios, strict=True):
            state = self.state[parameter]
            last = state["factor"]
            factor = ratio.to(last).clamp(MIN_FACTOR, MAX_FACTOR)
            state["factor"] = factor.clamp(last * (1 - FACTOR_CHANGE), last * (1 + FACTOR_CHANGE))
            found.append(state["coefficient"] * state["factor"])
        return found


def trust_ratios(parameters: Sequence[Tensor], updates: Sequence[Tensor], across: Across) -> list[Tensor]:
    """Norms of whole parameters over those of their updates."""
    norms = [torch.stack(torch._foreach_norm(list(x), 2, torch.float64)) for x in (parameters, updates)]
    weights, steps = across(parameters, torch.stack(norms).square(), "sum").sqrt()
    ratios = torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
    return [ratio.to(p.dtype) for p, ratio in zip(parameters, ratios, strict=True)]
