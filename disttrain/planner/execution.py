"""How a training code carries out a block: what decides the bytes moved beside its products. No torch."""

from typing import NamedTuple

from disttrain.config.schema import Config, Precision

HASH_BYTES = 73
"""Moved for each element by the hash of `disttrain.models.dropout`, operator by operator."""


class Execution(NamedTuple):
    """The habits of a code; `ours` is this one's, as `disttrain.models`, `precision` and `parallel` are written."""

    master: int
    """Bytes of an element of weights, gradients and moments in the optimizer."""
    narrow: int
    """Bytes of an element that is multiplied."""
    residual: int
    """Bytes of an element of the residual stream and of the norms, and of what one pipeline stage hands the next."""
    cast_bytes: int
    """Moved for each weight whenever it is used by a forward pass, to make what is multiplied."""
    gradient_bytes: int
    """Moved for each weight and micro-batch beside the product that gives its gradient: converted, and added up."""
    fused: bool
    """Whether what stands between two products is one operator (torch.compile, or kernels written for it)."""
    overlaps_tensor: bool
    """Whether tensor parallelism's messages of the forward pass travel beside the products."""
    fused_attention: bool
    """Whether scores are never in memory, where the device has a kernel for that."""
    mask_bytes: int
    """Moved for each element that dropout may drop, to find out whether it does."""


def ours(config: Config, precision: Precision) -> Execution:
    """Of this code: autocast in low precision, with fp32 master weights and residual stream (docs/decisions/0003)."""
    wide = 8 if precision == "fp64" else 4
    narrow = 2 if precision in ("bf16", "fp16") else wide
    converted = wide + narrow if narrow < wide else 0
    return Execution(
        master=wide,
        narrow=narrow,
        residual=wide,
        cast_bytes=converted,
        gradient_bytes=converted + 3 * wide,
        fused=config.run.compile,
        overlaps_tensor=False,
        fused_attention=config.model.dropout == 0,
        mask_bytes=HASH_BYTES,
    )
