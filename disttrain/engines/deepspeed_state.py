"""Whole weights, gradients and moments of a DeepSpeed engine, whatever its stage cuts them into.

All ranks call each of these together, parameter by parameter in the same order: what is cut is gathered by DeepSpeed's own
accessors. Only AdamW's state is known here.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def weight(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The whole parameter as the optimizer has it (float32)."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach()
    return import_module("deepspeed.utils").safe_get_full_fp32_param(parameter).detach()


def working_copy(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The whole parameter as the model computes with it."""
    with _gathered(engine, parameter, written=False):
        return parameter.detach().clone()


def gradient(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """The mean of the ranks' whole gradients, scaled as the loss was; between the last backward pass and the update."""
    if engine.zero_optimization_stage() == 0:
        return parameter.grad
    return import_module("deepspeed.utils").safe_get_full_grad(parameter)


def moments(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's whole state of a parameter: step, exp_avg, exp_avg_sq."""
    state = _ready_state(engine)
    step = next((s["step"] for s in state.values() if "step" in s), torch.zeros(()))
    found = {"step": step.detach().clone().float().cpu()}
    if engine.zero_optimization_stage() == 0:
        return found | {key: state[parameter][key].detach() for key in MOMENTS}
    whole = import_module("deepspeed.utils").safe_get_full_optimizer_state
    return found | {key: whole(parameter, key).detach() for key in MOMENTS}


def put(engine: Any, parameter: nn.Parameter, value: Tensor, state: dict[str, Tensor]) -> None:
    """Overwrite a parameter, the model's working copy of it and its moments with whole ones."""
    ready = _ready_state(engine)
    for entry in ready.values():
        entry["step"].copy_(state["step"])
    with _gathered(engine, parameter, written=True), torch.no_grad():
        parameter.copy_(value.to(parameter.dtype))
    if engine.zero_optimization_stage() == 0:
        for key in MOMENTS:
            ready[parameter][key].copy_(state[key])
        return
    utils = import_module("deepspeed.utils")
    utils.safe_set_full_fp32_param(parameter, value)
    for key in MOMENTS:
        utils.safe_set_full_optimizer_state(parameter, state[key], key)


def allocate(engine: Any) -> None:
    """AdamW's state as it is before the first step; called before one is taken.

    Some stages have taken a step with zero gradients to allocate it. Others leave it to the first step, which connects
    parameters with their moments after the first parameter group already: those of the second would never be found.
    """
    for state in _ready_state(engine).values():
        for value in state.values():
            value.zero_()


def _gathered(engine: Any, parameter: nn.Parameter, written: bool) -> Any:
    if engine.zero_optimization_stage() != 3:
        return nullcontext()
    zero = import_module("deepspeed").zero
    return zero.GatheredParameters([parameter], modifier_rank=0 if written else None)


def _inner(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _ready_state(engine: Any) -> Any:
    """The inner optimizer's state, allocated where no step has done so yet."""
    inner = _inner(engine)
    for parameter in _optimised(engine, inner):
        if not inner.state[parameter]:
            zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            device = parameter.device if inner.defaults.get("fused") else "cpu"  # as torch allocates it
            inner.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device), **zeros}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
    return inner.state


def _optimised(engine: Any, inner: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What the inner optimizer updates; stage 3 shows it one flat group at a time, and keeps them all itself."""
    if engine.zero_optimization_stage() == 3:
        yield from engine.optimizer.fp32_partitioned_groups_flat
        return
    for group in inner.param_groups:
        yield from group["params"]
