"""Which parameters' gradients are coded: the one rule. No torch."""

from collections.abc import Sequence
from math import prod

from disttrain.config.schema import CompressionConfig


def may_be_coded(compression: CompressionConfig, name: str, shape: Sequence[int]) -> bool:
    """Whether the gradient of a parameter of this local shape is coded, where its code is smaller than it is (which only a
    rank of powersgd or a share that is far too large can fail) and no other rank has a copy to be kept equal."""
    if len(shape) < 2 or prod(shape) < compression.min_elements:
        return False
    vocabulary = "embed." in name or "decoder." in name
    return compression.embeddings or not vocabulary
