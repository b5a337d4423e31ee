"""What a block keeps for its backward pass, and compiling blocks."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from disttrain.models import Model
from disttrain.models.dropout import Dropout, as_tensor
from disttrain.models.layers import Attention, attending


def apply_recompute(model: Model, mode: Literal["none", "selective", "full"]) -> None:
    """Let the backward pass compute activations again instead of keeping them; in place, names stay.

    "full" keeps of every block its input alone (Chen et al. 2016). "selective" keeps all but what is inside the
    attention function, which grows with the square of the sequence (Korthikanti et al. 2022, section 5). Collectives
    inside run again, in the same order on every rank. Dropout's masks are pure functions: no random state is kept.
    Call it after context parallelism, which replaces the attention function, and before `compile_blocks`.
    """
    if mode == "full":
        for block in model.blocks.values():
            block.forward = _again(block.forward)
    if mode == "selective":
        for module in attending(model):
            module.attend = _again(module.attend)


def compile_blocks(model: Model, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile every block, in place; names stay.

    Blocks are alike, so the first one's graph serves all that see the same shapes. A block that is recomputed runs its
    compiled form twice.
    """
    for module in model.modules():
        if isinstance(module, (Attention, Dropout)) and isinstance(module.site, int):
            constant: Any = as_tensor(module.site)
            module.site = constant
    for block in model.blocks.values():
        forward = block.forward
        if isinstance(forward, _Recomputed):  # torch.compile would give up on the checkpoint, and on all inside it
            forward.function = torch.compile(forward.function, backend=backend)
        else:
            block.compile(backend=backend)


def _again(function: Callable[..., Any]) -> Any:
    return _Recomputed(function)


class _Recomputed:
    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return checkpoint(self.function, *args, use_reentrant=False, preserve_rng_state=False)
