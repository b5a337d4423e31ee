"""What Adam's relatives have in common: moments, corrected for their bias, and the step that follows; 1-bit Adam."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[Tensor, dict[str, Tensor]]
"""An optimizer's state by parameter."""


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
