"""What a run leaves to be compared: of each step, and of one process altogether."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from disttrain.precision import LossScale
from disttrain.verify.plan import SAVED


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
    saved: LossScale = LossScale(1.0, 0, 1.0)
    """The loss scale in it."""

    @property
    def repeated(self) -> StepTrace:
        """The step that is done again from the checkpoint: the next one that was not skipped, as it is without the skip."""
        trace = next(trace for trace in self.steps if trace.step > SAVED and not trace.ranks[0].skipped)
        return replace(trace, ranks=[self.unskipped(trace.ranks[0])])

    def unskipped(self, view: RankView) -> RankView:
        """With the loss scale of the checkpoint, which no skipped step has halved."""
        return replace(view, scales=scales(self.saved.value, self.saved.after(overflow=False)))


def scales(value: float, after: LossScale) -> dict[str, float]:
    """The loss scale of a step, and as the next one begins."""
    return {"loss_scale": value, "next_loss_scale": after.value, "good_steps": after.good_steps}
