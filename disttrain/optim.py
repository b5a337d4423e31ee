"""Parameter groups, the optimizers and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from disttrain.config.schema import ONE_BIT, GradientCodec, OptimConfig

State = Mapping[Tensor, dict[str, Tensor]]
Across = Callable[[Sequence[Tensor], Tensor, Literal["sum", "max"]], Tensor]
"""For parameters of which this rank may hold parts, and a column of numbers for each, those of the whole parameters. All
ranks that hold parts call it together."""

MIN_COEFFICIENT, MAX_COEFFICIENT = 0.01, 10.0
"""Bounds of a trust ratio in the warm-up of 1-bit LAMB: these are the values of the paper's authors, as all that follow."""
COEFFICIENT_BETA = 0.9
"""Decay of the trust ratio's moving average."""
MIN_FACTOR, MAX_FACTOR, FACTOR_CHANGE = 0.5, 4.0, 0.1
"""Bounds of what the average is multiplied by after the warm-up, and the share by which this may change in a step."""


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and layer normalisation (fewer than two dimensions) do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def alone(parameters: Sequence[Tensor], values: Tensor, how: str) -> Tensor:
    """Whole parameters are here."""
    return values


def build_optimizer(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]], codec: GradientCodec = "none",
    across: Across = alone,
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), by torch's fused or foreach kernel; or LAMB. For the
    codecs `ONE_BIT` one whose second moments can be frozen."""
    groups, betas = parameter_groups(parameters, config.weight_decay), (config.beta1, config.beta2)
    if config.name == "lamb":
        return (OneBitLamb if codec in ONE_BIT else Lamb)(groups, config.lr, betas, config.epsilon, across)
    fused = config.implementation in ("auto", "fused")
    return (OneBitAdamW if codec in ONE_BIT else torch.optim.AdamW)(
        groups, lr=config.lr, betas=betas, eps=config.epsilon, fused=fused, foreach=None if fused else True
    )


def no_moments(parameter: Tensor) -> dict[str, Tensor]:
    """The state that AdamW and LAMB start from."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


class OneBitAdamW(torch.optim.AdamW):
    """AdamW whose second moments, and their bias correction, stay what they are while it is `frozen` (Tang et al. 2021)."""

    frozen = False
    MORE = ("frozen_step",)
    """State beside AdamW's: steps that the second moments have seen."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update."""
        if not self.frozen:
            forget(self.state, self.MORE)
            super().step()
            return
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            seen = freeze(self.state, parameters)
            learn(self.state, parameters, group["betas"], None)
            below = denominators(self.state, parameters, "exp_avg_sq", seen, group["betas"][1], group["eps"])
            updates = directions(self.state, parameters, below, group["betas"][0], frozen=True)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


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


def learn(state: State, parameters: Sequence[Tensor], betas: tuple[float, float], second: str | None) -> None:
    """Take the gradients into the first moment, and into the second one of this name."""
    for p in parameters:
        if not state[p]:
            state[p].update(no_moments(p))
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_add_([state[p]["step"] for p in parameters], 1)
    torch._foreach_lerp_([state[p]["exp_avg"] for p in parameters], gradients, 1 - betas[0])
    if second is not None:
        squares = [state[p][second] for p in parameters]
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])


def freeze(state: State, parameters: Sequence[Tensor]) -> list[Tensor]:
    """How many steps the second moments have seen when they are no longer to change; before `learn`."""
    for p in parameters:
        if not state[p]:
            state[p].update(no_moments(p))
        state[p].setdefault("frozen_step", state[p]["step"].clone())
    return [state[p]["frozen_step"] for p in parameters]


def forget(state: State, keys: Sequence[str]) -> None:
    """Drop what a frozen optimizer has added."""
    for each in state.values():
        for key in keys:
            each.pop(key, None)


def denominators(
    state: State, parameters: Sequence[Tensor], second: str, seen: Sequence[Tensor], beta2: float, eps: float
) -> list[Tensor]:
    """Root of a second moment, corrected for the steps that it has seen, and epsilon."""
    below = list(torch._foreach_sqrt([state[p][second] for p in parameters]))
    corrections = (1 - beta2 ** torch.stack(list(seen)).double()).clamp(min=1e-30)  # none seen: 0 / 0
    torch._foreach_div_(below, list(corrections.sqrt().unbind()))
    torch._foreach_add_(below, eps)
    return below


def directions(
    state: State, parameters: Sequence[Tensor], below: list[Tensor], beta1: float, frozen: bool = False
) -> list[Tensor]:
    """The corrected first moment divided by what is `below`, in the memory of that.

    A `frozen` second moment of zero, where no gradient came in the warm-up (positions beyond the sequences, say), would
    turn the noise that a sign is there into steps of any length: there is no direction.
    """
    torch._foreach_reciprocal_(below)
    torch._foreach_mul_(below, [state[p]["exp_avg"] for p in parameters])
    corrections = 1 - beta1 ** torch.stack([state[p]["step"] for p in parameters]).double()
    torch._foreach_div_(below, list(corrections.unbind()))
    for p, direction in zip(parameters, below, strict=True) if frozen else ():
        direction.masked_fill_(state[p]["exp_avg_sq"] == 0, 0.0)
    return below


def trust_ratios(parameters: Sequence[Tensor], updates: Sequence[Tensor], across: Across) -> list[Tensor]:
    """Norms of whole parameters over those of their updates."""
    norms = [torch.stack(torch._foreach_norm(list(x), 2, torch.float64)) for x in (parameters, updates)]
    weights, steps = across(parameters, torch.stack(norms).square(), "sum").sqrt()
    ratios = torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
    return [ratio.to(p.dtype) for p, ratio in zip(parameters, ratios, strict=True)]


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 1 to `total_steps`.

    Linear warm-up reaches the peak at `warmup_steps`. Then, with m = min_lr_ratio and x the share of the remaining
    steps that is done: constant: 1; linear: 1 - (1-m)x; cosine: m + (1-m)(1 + cos(pi x))/2 (Loshchilov and Hutter
    2017); inverse_sqrt: sqrt(warmup/step) (Vaswani et al. 2017); wsd: 1, then linear to m over the last
    `decay_fraction` of all steps (Hu et al. 2024).
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    low = config.min_lr_ratio
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - low) * done
        case "cosine":
            factor = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        case "inverse_sqrt":
            factor = math.sqrt(warmup / step)
        case "wsd":
            decay_steps = max(round(config.decay_fraction * total_steps), 1)
            factor = 1 - (1 - low) * max(0.0, 1 - (total_steps - step) / decay_steps)
    return config.lr * factor
