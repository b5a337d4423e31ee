"""What a run leaves to be compared: of each step, and of one process altogether."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class RankView:
    """What one rank says about a step."""

    losses: dict[str, float]
    counts: dict[str, int]
    norm: float
    skipped: bool
    scales: dict[str, float]


@dataclass
class StepTrace:
    """What happened in one step."""

    step: int
    ranks: list[RankView]
    gradients: dict[str, Tensor]
    """Of the whole batch, unscaled, before clipping."""
    clipped: dict[str, Tensor]
    """As the optimizer met them; empty when the step was skipped."""
    weights: dict[str, Tensor]
    apart: dict[str, dict[str, float]] = field(default_factory=dict)
    """How far copies of a gradient and of a weight are apart on different ranks, relative to the largest element."""


@dataclass
class Reference:
    """One process, one micro-batch."""

    tied: dict[str, str]
    initial: dict[str, Tensor]
    steps: list[StepTrace] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: Path = Path()
    files: dict[str, Tensor] = field(default_factory=dict)
    """What is in that checkpoint."""
