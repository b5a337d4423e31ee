"""What a layout's step must give: what one process gave, or what follows from the layout's own gradients.

In less than float64 the weights of two correct runs part quickly: Adam divides small gradients by their own size, so that
an element whose gradient is mostly noise moves a whole learning rate this way or that. Only losses and gradients are then
held against float64. Norm, clipping, update, copies and checkpoints follow from the run's own gradients to the last bits,
and are compared with one process that is given these.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from disttrain.config.schema import Config, Precision
from disttrain.optim import build_optimizer
from disttrain.precision import master_dtype
from disttrain.verify.plan import SAVED, rate
from disttrain.verify.records import Reference, StepTrace


class Following(Protocol):
    """One process beside a layout, on rank 0."""

    def start(self, initial: Mapping[str, Tensor]) -> None:
        """Training begins from these weights of the layout's."""
        ...

    def step(self, ours: StepTrace) -> StepTrace:
        """What this step must give; steps come in order."""
        ...

    @property
    def weights(self) -> dict[str, Tensor]:
        """Whole weights as they are now."""
        ...

    @property
    def files(self) -> dict[str, Tensor]:
        """What a checkpoint holds now, under its names."""
        ...

    def resumed(self) -> "Following":
        """For a fresh engine that has loaded the layout's own checkpoint."""
        ...

    def resharded(self) -> "Following":
        """For one that has loaded the checkpoint of one process."""
        ...


def expectation(config: Config, precision: Precision, reference: Reference) -> Following:
    """What a layout in this precision must give, beside the reference."""
    return Repeated(reference) if precision == "fp64" else Derived(config, precision, reference)


class Repeated:
    """float64: every quantity is that of the reference."""

    def __init__(self, reference: Reference, resumed: bool = False):
        self.reference, self.done, self._resumed = reference, SAVED if resumed else 0, resumed

    def start(self, initial: Mapping[str, Tensor]) -> None:
        """The reference began from its own."""

    def step(self, ours: StepTrace) -> StepTrace:
        """The reference's step."""
        self.done = ours.step
        return self.reference.repeated if self._resumed else self.reference.steps[ours.step - 1]

    @property
    def weights(self) -> dict[str, Tensor]:
        """After the last step."""
        return self.reference.steps[self.done - 1].weights

    @property
    def files(self) -> dict[str, Tensor]:
        """Of the reference's one checkpoint."""
        return self.reference.files

    def resumed(self) -> "Repeated":
        """The same once more."""
        return Repeated(self.reference, resumed=True)

    def resharded(self) -> "Repeated":
        """The same once more."""
        return Repeated(self.reference, resumed=True)


class Derived:
    """Less than float64: gradients and losses of the reference; the rest from the layout's own gradients."""

    def __init__(self, config: Config, precision: Precision, reference: Reference):
        self.config, self.reference = config, reference
        self.precision: Precision = precision
        self.saved: dict[str, Tensor] = {}
        self.last: StepTrace | None = None

    def start(self, initial: Mapping[str, Tensor]) -> None:
        """One process takes over the weights, with a fresh optimizer."""
        self.parameters = {name: nn.Parameter(weight.clone()) for name, weight in initial.items()}
        self.optimizer = build_optimizer(
            self.config.optim, list(self.parameters.items()), heads=self.config.model.heads
        )

    def step(self, ours: StepTrace) -> StepTrace:
        """The reference's losses, gradients and decisions, and what follows from our gradients."""
        reference = self.reference.steps[ours.step - 1]
        (view,) = reference.ranks
        clipped: dict[str, Tensor] = {}
        if not view.skipped:
            squares = torch.stack([gradient.double().square().sum() for gradient in ours.gradients.values()])
            view = replace(view, norm=float(squares.sum().sqrt()))
            limit = self.config.train.clip_grad_norm or math.inf
            factor = min(1.0, limit / (view.norm + 1e-6))
            clipped = {name: gradient * factor for name, gradient in ours.gradients.items()}
            self._update(clipped, rate(self.config, ours.step))
        expected = replace(reference, ranks=[view], clipped=clipped, weights=self.weights)
        if ours.step == SAVED:
            self.saved = self.weights
        if ours.step == self.reference.repeated.step:
            self.last = replace(ours, ranks=[self.reference.unskipped(ours.ranks[0])])
        return expected

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the one process."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @property
    def files(self) -> dict[str, Tensor]:
        """Of the one process."""
        found = {f"model.{name}": weight for name, weight in self.weights.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            found |= {f"optimizer.{name}.{key}": value.detach().clone() for key, value in state.items()}
        return found

    def resumed(self) -> Following:
        """The layout's own uninterrupted step, bit for bit."""
        assert self.last is not None
        return _Again(self.last, self.saved, self)

    def resharded(self) -> Following:
        """One process from the reference's checkpoint."""
        other, dtype = Derived(self.config, self.precision, self.reference), master_dtype(self.precision)
        files = self.reference.files
        other.start({name: files[f"model.{name}"].to(dtype) for name in self.parameters})
        for name, parameter in other.parameters.items():
            start = f"optimizer.{name}."
            state = {key.removeprefix(start): value for key, value in files.items() if key.startswith(start)}
            other.optimizer.state[parameter] = {
                key: value.clone() if value.ndim == 0 else value.to(dtype, copy=True) for key, value in state.items()
            }
        return other

    def _update(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        self.optimizer.step()


class _Again:
    """A step of a layout that must be repeated, from given weights."""

    def __init__(self, last: StepTrace, weights: dict[str, Tensor], before: Derived):
        self.last, self.weights, self._before = last, weights, before

    def start(self, initial: Mapping[str, Tensor]) -> None:
        """It does not start anew."""

    def step(self, ours: StepTrace) -> StepTrace:
        """The same again."""
        return self.last

    @property
    def files(self) -> dict[str, Tensor]:
        """Those of the run before."""
        return self._before.files

    def resumed(self) -> Following:
        """As before."""
        return self._before.resumed()

    def resharded(self) -> Following:
        """As before."""
        return self._before.resharded()
