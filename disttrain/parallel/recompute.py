"""What a block keeps for its backward pass, and compiling blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from disttrain.models.layers import Attention, Block


def apply_recompute(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Let the backward pass compute activations again instead of keeping them; in place, names stay.

    "full" keeps the input of every block alone (Chen et al. 2016). "selective" keeps all but what is inside the
    attention function, whose size grows with the square of the sequence (Korthikanti et al. 2022, section 5). Collectives
    inside run again, in the same order on every rank. Dropout's masks are pure functions: no random state is kept.
    Call it after tensor and context parallelism, which replace the attention function.
    """
    if mode == "none":
        return
    for module in model.modules():
        if mode == "full" and isinstance(module, Block):
            module.forward = _again(module.forward)
        if mode == "selective" and isinstance(module, Attention):
            module.attend = _again(module.attend)


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile every block, in place. Blocks are alike, so all but the first are quick; names stay."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=backend)
