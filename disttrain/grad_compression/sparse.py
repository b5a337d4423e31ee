"""Codecs that send a few values and their places: those of all ranks go to every rank, which adds them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disttrain.grad_compression.packing import numbers


@dataclass(frozen=True)
class TopK:
    """The largest magnitudes, a share `ratio` of all, with their places (Aji and Heafield 2017; Stich et al. 2018)."""

    ratio: float
    carried: Literal["gather"] = "gather"
    unbiased: bool = False
    block: int = 1
    fixed: bool = True
    added = None

    def count(self, n: int) -> int:
        """How many of n values are sent."""
        return max(1, round(self.ratio * n))

    def nbytes(self, n: int) -> int:
        """Four bytes a place and two (bfloat16) a value."""
        return 6 * self.count(n)

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """Places, then values."""
        return places_and_values(x, torch.stack([largest(row, self.count(x.shape[1])) for row in x.abs()]), lost)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Zero elsewhere."""
        return add_values(torch.zeros(len(code), n, dtype=dtype, device=code.device), code)


@dataclass(frozen=True)
class Threshold:
    """Values of at least `times` the vector's root mean square, as many as there are.

    After Strom 2015, with a threshold that follows the gradient. By Chebyshev at most n / times^2 are.
    """

    times: float
    carried: Literal["gather"] = "gather"
    unbiased: bool = False
    block: int = 1
    fixed: bool = False
    added = None

    def nbytes(self, n: int) -> int:
        """At most: four bytes a place and two (bfloat16) a value."""
        return 6 * int(n / self.times**2)

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """Places, then values, of one row; of all where it is not finite."""
        rms = torch.linalg.vector_norm(x) / math.sqrt(x.numel())
        return places_and_values(x, (~(x[0].abs() < self.times * rms)).nonzero().view(1, -1), lost)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Zero elsewhere."""
        return add_values(torch.zeros(len(code), n, dtype=dtype, device=code.device), code)


def places_and_values(x: Tensor, places: Tensor, lost: bool) -> Tensor:
    """Bytes [rows, 6 k]: int32 places, then bfloat16 values. With `lost`, x keeps their rounding errors there."""
    exact = x.gather(1, places)
    values = exact.to(torch.bfloat16)
    if lost:
        x.scatter_(1, places, exact - values)
    return torch.cat([places.int().view(torch.uint8), values.view(torch.uint8)], 1)


def add_values(x: Tensor, code: Tensor) -> Tensor:
    """Add the values of codes [rows, 6 k] at their places of [rows, n]."""
    head = 4 * (code.shape[1] // 6)
    return x.scatter_add_(
        1, numbers(code[:, :head], torch.int32).long(), numbers(code[:, head:], torch.bfloat16).to(x.dtype)
    )


EVERY = 61
"""Every so-manieth element is looked at first: a prime, or it could be the same columns of each row of a matrix."""


def largest(x: Tensor, count: int) -> Tensor:
    """Places of the largest of [n], NaN above all: those of topk, which on a CPU takes 5 times as long.

    It is given those above a limit only, which a sample tells, or all where that was too high or left out too few.
    """
    seen = x[::EVERY]
    expected = count * len(seen) / len(x)
    above = math.ceil(expected + 4 * math.sqrt(expected))
    if x.device.type == "cpu" and above < len(seen):
        limit = seen.topk(above, sorted=False).values.amin()
        places = (~(x < limit)).nonzero().view(-1)
        if count <= len(places) < len(x) // 2:
            return places[x[places].topk(count, sorted=False).indices]
    return x.topk(count, sorted=False).indices
