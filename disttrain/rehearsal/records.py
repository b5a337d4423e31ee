"""What one rank has called in a rehearsal. Imports no torch."""

from dataclasses import dataclass, field
from typing import NamedTuple

from disttrain.hang.files import Call


@dataclass(frozen=True)
class Recorded:
    """A collective, or one end of a message between two ranks."""

    call: Call
    """`since` is its place among all calls of the rank; sends and receives are numbered for each sender and receiver."""
    at: str
    """File, line and source."""
    phase: str
    """"start", or the step: "step 1"."""
    handed_bytes: int
    """What this rank hands over; 0 of a receive."""
    ends: tuple[int, int] | None = None
    """Sender and receiver in the world; None of a collective."""
    waits: bool = False
    """Whether the rank goes on only when the others have come: a collective that is not asynchronous."""


class LiveBytes(NamedTuple):
    """Bytes of the storages of all tensors that are alive when most are, by what they hold."""

    weights: int
    """What the optimizer updates: shards under ZeRO."""
    copies: int
    """Weights in low precision, and what ZeRO has gathered."""
    gradients: int
    optimizer: int
    feedback: int
    """Residuals of coded gradients."""
    outer: int
    """Outer weights and momentum of workers that take steps of their own."""
    activations: int
    """What a forward pass has made, batches included."""
    buffers: int
    """What a backward pass, or what comes after it, has made beside gradients."""
    step: str
    """"step 2", or "evaluation"."""
    phase: str
    """"forward", "backward", or "update": all that follows the last backward pass."""
    operator: str
    """torch's operator that has made the last of these tensors."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.size(part) for part in PARTS)

    def size(self, part: str) -> int:
        """One of `PARTS`."""
        return getattr(self, part)


PARTS = LiveBytes._fields[:8]
"""The kinds of tensors."""


@dataclass
class Trace:
    """All that one rank has called, in order."""

    rank: int
    recorded: list[Recorded] = field(default_factory=list)
    handed_bytes: int = 0
    """What the last step handed over, as the engine counts it."""
    guessed: set[str] = field(default_factory=set)
    """Lines that read a value which a rehearsal does not have: it went on with 1, or true."""
    live: LiveBytes | None = None
    """The peak of the step after the last recorded one, or of the evaluation, where it was counted."""
    error: str | None = None
    """What the rehearsal of this rank has failed with; then nothing is recorded."""
    at: str = ""
    """Line of that failure."""
