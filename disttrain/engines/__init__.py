"""Engines: what executes one optimizer step. The boundary is the step (design, section 3)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from disttrain.models.layers import LossSum

Batch = Mapping[str, np.ndarray]
State = dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over the whole global batch. Tensors stay on the device until they are read."""

    losses: dict[str, LossSum]
    """Sum and count of each objective over all ranks and micro-batches."""
    tokens: Tensor
    """Real (not padding) tokens of all ranks; int64 scalar."""
    positions: int
    """Tokens and padding of all ranks."""
    grad_norm: Tensor
    """Global 2-norm of the gradient before clipping."""
    loss_scale: float
    """Loss scale of this step."""
    skipped: bool
    """Whether the update was skipped because a gradient overflowed."""


class Engine(Protocol):
    """One optimizer step, evaluation and state; all ranks call each method together."""

    def step(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """Forward, backward, reduce, unscale, clip, update: this rank's micro-batches of step number `step`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, LossSum]:
        """Sums over all ranks of every objective and score of these batches, without gradients or dropout."""
        ...

    def traffic(self) -> tuple[int, int]:
        """Bytes handed to collectives since the last call: (sent, without compression)."""
        ...

    def bubble(self) -> tuple[float, float] | None:
        """Seconds in which this rank's stages computed and seconds of the pipeline's steps since the last call."""
        ...

    def state_dict(self) -> State:
        """Model and optimizer for a distributed checkpoint, and `engine`, a plain dictionary."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        ...

    def close(self) -> None:
        """Release what was acquired."""
        ...
