"""Engines: what executes one optimizer step. The boundary is the step (design, section 3)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from disttrain.config.schema import Config, Precision
from disttrain.models.layers import LossSum
from disttrain.parallel.collectives import Counted
from disttrain.parallel.groups import Groups
from disttrain.parallel.sharding import Shard
from disttrain.precision import LossScale

Batch = Mapping[str, np.ndarray]
State = dict[str, Any]
Saved = Callable[[], Mapping[str, Sequence[int]]]
"""Looks up names and shapes of a checkpoint's tensors."""
Moment = Literal["reduced", "clipped", "updated"]
Held = Literal["weight", "parameter", "gradient"]
"""What a rank holds of every parameter: as the optimizer has it, as the model computes with it, and its gradient."""

ENGINES = {
    "native": ("disttrain.engines.native", "NativeEngine"),
    "deepspeed": ("disttrain.engines.deepspeed", "DeepSpeedEngine"),
    "horovod": ("disttrain.engines.horovod", "horovod_engine"),
}
"""What `engine` can be: module, and what it calls to make one; imported when it is chosen."""


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

    watch: Callable[[Moment], None] | None
    """Called within a step when gradients are complete but still scaled, when clipped (DeepSpeed does not say), and when
    updated: for proofs and profiles."""

    def step(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """Forward, backward, reduce, unscale, clip, update: this rank's micro-batches of step number `step`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, LossSum]:
        """Sums over all ranks of every objective and score of these batches, without gradients or dropout."""
        ...

    def predict(self, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """For each of this rank's batches what a task's model predicts (`predictions_of`), on the host; empty on ranks
        without the head. Ranks of one tensor group say the same."""
        ...

    def traffic(self) -> Counted:
        """Bytes handed to collectives since the last call, before and after codecs, and on the wire."""
        ...

    def bubble(self) -> tuple[float, float] | None:
        """Seconds in which this rank's stages computed and seconds of the pipeline's steps since the last call."""
        ...

    def forward_seconds(self) -> float | None:
        """Seconds of this rank's forward passes since the last call; None where they are not known."""
        ...

    def kept(self) -> Mapping[str, list[Tensor]]:
        """This rank's tensors that stay from step to step by kind, `weights` and `optimizer` (all that updates need), and
        its `gradients` as long as there are some. For a profile of its memory."""
        ...

    def state_dict(self) -> State:
        """Model and optimizer for a distributed checkpoint, and `engine`, a plain dictionary."""
        ...

    def to_fill(self, saved: Saved) -> State:
        """Tensors to load a checkpoint with these into: those of `state_dict`, and what only the checkpoint has."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take over what `to_fill` gave, filled, and `engine`."""
        ...

    def close(self) -> None:
        """Release what was acquired."""
        ...


class ProvenEngine(Engine, Protocol):
    """What `disttrain verify` looks at beside: the inside of a step, weights and gradients."""

    groups: Groups

    @property
    def scale(self) -> LossScale:
        """The loss scale as the next step begins."""
        ...

    def held(self, what: Held) -> list[tuple[Shard, Tensor]]:
        """This rank's part of every weight, of the model's copy of it, or of its (scaled) gradient. All ranks call it."""
        ...


class Reduction(Protocol):
    """Another library's summing of gradients over the data ranks, in the native engine's step."""

    def attach(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """Watch these parameters' gradients from now on; the optimizer whose state is saved."""
        ...

    def complete(self) -> None:
        """After the step's last backward pass: wait until every gradient is the **sum** over all ranks."""
        ...

    def update(self) -> None:
        """The optimizer's step, on gradients that are complete, unscaled and clipped."""
        ...

    def agree(self) -> None:
        """Before a checkpoint: make the same on all ranks what differs between them."""
        ...

    def close(self) -> None:
        """Leave the library's world, together with all ranks; nothing can be reduced after this."""
        ...


def build(config: Config, groups: Groups, device: torch.device, precision: Precision) -> ProvenEngine:
    """The engine that the config names; all ranks call it together. `precision` is resolved, never "auto"."""
    module, maker = ENGINES[config.engine]
    return getattr(import_module(module), maker)(config, groups, device, precision)
