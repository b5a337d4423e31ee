"""A group of ranks as codecs see it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


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

    def gather(self, tensor: Tensor) -> Tensor:
        """[ranks, n] of every rank's [n]."""
        ...

    def exchange(self, rows: Tensor) -> Tensor:
        """Row r of [ranks, n] goes to rank r; what came, by sender."""
        ...

    def instead_of(self, tensors: Sequence[Tensor]) -> None:
        """Count what would have been handed over without a codec."""
        ...
