"""What a rank holds of whole parameters, and how optimizers that need whole ones put the parts together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Across = Callable[[Sequence[Tensor], Tensor, Literal["sum", "max"]], Tensor]
"""For parameters of which this rank may hold parts, and a column of numbers for each, those of the whole parameters. All
ranks that hold parts call it together."""


@dataclass(frozen=True)
class Parts:
    """Parameters by what is here of them. All ranks that hold parts of one call each function together."""

    across: Across
    shape: Callable[[Tensor], torch.Size]
    """Of the whole parameter."""
    slices: Callable[[Tensor], tuple[slice, ...]]
    """Where this rank's part lies in the whole."""
    summed: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    """A vector for each parameter, as long on every rank -> its sum over the parts; copies of a part count once."""
    gathered: Callable[[Tensor, Tensor], Tensor]
    """A parameter, and a tensor like its part -> the whole tensor of all parts."""


def alone(parameters: Sequence[Tensor], values: Tensor, how: str) -> Tensor:
    """Whole parameters are here."""
    return values


def _everywhere(parameter: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in parameter.shape)


WHOLE = Parts(
    alone, lambda p: p.shape, _everywhere, lambda parameters, vectors: list(vectors), lambda parameter, part: part
)
"""This rank holds whole parameters."""
