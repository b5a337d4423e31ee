"""A group of ranks as codecs see it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Arrival = Callable[[], Tensor]
"""Waits for what is on its way, and gives it."""


class Link(Protocol):
    """The ranks whose gradients are summed. All of them make the same calls in the same order; bytes are counted."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def rank(self) -> int:
        """Place of this rank among them."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks in place."""
        ...

    def gather(self, tensor: Tensor) -> Arrival:
        """[ranks, n] of every rank's [n], which must not change before it has come."""
        ...

    def exchange(self, rows: Tensor) -> Arrival:
        """Row r of [ranks, n] goes to rank r; what came, by sender. The rows must not change before it has come."""
        ...

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Count what would have been handed over without a codec."""
        ...
