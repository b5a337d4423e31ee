"""What differs between a layout and one process: every quantity by phase, in the order in which causes have effects."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.verify.tolerance import Key, Tolerance

PHASES = ("run", "initial_weights", "counts", "forward", "gradients", "grad_norm", "skip", "clip", "weights", "replicas",
          "evaluation", "checkpoint", "resume", "reshard")  # fmt: skip
"""Phases of a step and of what follows training, causes before effects.

run: the layout raises or does not finish. replicas: copies of weights that must be equal on several ranks. checkpoint:
what the layout wrote, read by one process. resume: a fresh engine goes on from it. reshard: that engine goes on from the
checkpoint of one process.
"""

SMALL_TENSOR = 1e-3
"""A tensor's error is taken relative to its largest element plus this share of the largest element of all tensors.

Some gradients are zero but for rounding (softmax does not see a constant added to every key); their rounding errors
are relative to the terms that cancel, which are of the size of the other gradients.
"""


Found = tuple[float, float, float, float | None]
"""(relative error, ours and the reference's where they differ most, common factor)."""

NOTHING: Found = (math.inf, math.nan, math.nan, None)
"""One of the two is not there, or is no number."""


@dataclass(frozen=True)
class Difference:
    """One quantity under the layout beside that of one process."""

    phase: str
    step: int
    """Optimizer step, counted from 1; 0 is before training."""
    name: str
    """Full name of a parameter, or of a number."""
    error: float
    """Relative to the largest element of the reference, or of root mean squares."""
    bound: float
    """Largest error that passes."""
    ours: float
    """At the element that differs most."""
    expected: float
    ratio: float | None = None
    """What the reference was multiplied by, where one factor explains the whole tensor."""
    note: str = ""
    """On which rank."""
    part: str = ""
    """Within resume and reshard: the phase of the step that was repeated."""

    @property
    def failed(self) -> bool:
        """Whether it is more than rounding."""
        return not self.error <= self.bound

    @property
    def excess(self) -> float:
        """Error in units of the bound."""
        if self.error == 0:
            return 0.0
        return math.inf if math.isnan(self.error) or self.bound == 0 else self.error / self.bound


@dataclass
class Ledger:
    """Errors of one run, as they come; `label` files everything that follows under one phase."""

    tolerance: Tolerance
    label: str | None = None
    worst: dict[str, Difference] = field(default_factory=dict)
    """The largest error of each phase."""
    errors: dict[Key, float] = field(default_factory=dict)
    """The largest of each quantity; the phase is that of the step, after the label if there is one."""
    failures: list[Difference] = field(default_factory=list)

    def tensors(
        self, phase: str, step: int, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor],
        tied: Mapping[str, str], note: str = "",
    ) -> None:  # fmt: skip
        """Compare whole tensors by full name. A tied name may be missing, and is compared with its source's."""
        if self.tolerance.together(self._kind(phase), step) and ours.keys() == expected.keys():
            whole = [torch.cat([tensors[name].double().flatten() for name in expected]) for tensors in (ours, expected)]
            ours, expected = {"all parameters": whole[0]}, {"all parameters": whole[1]}
        alike = {n: (ours[n], t) for n, t in expected.items() if n in ours and t.numel() and ours[n].shape == t.shape}
        others = (self._size(t.detach().double()) for n, t in expected.items() if n not in alike and t.numel())
        errors, largest = self._errors(alike, max(others, default=0.0))
        detailed = self._detailed(phase, step, errors)
        for name, value in expected.items():
            if name in detailed or (name in ours and name not in alike):
                self._add(self._compare(ours[name], value, largest), phase, step, name, note)
            elif name not in ours and name not in tied:
                self._add(NOTHING, phase, step, name, "it is missing")
        for name in ours.keys() - expected.keys():
            source = expected.get(tied.get(name, ""))
            found = NOTHING if source is None else self._compare(ours[name], source, largest)
            self._add(found, phase, step, name, note if source is not None else "one process has no such parameter")

    def number(self, phase: str, step: int, name: str, ours: float, expected: float, note: str = "") -> None:
        """Compare a number; two that are not finite are equal."""
        if not math.isfinite(expected) or not math.isfinite(ours):
            error = 0.0 if math.isfinite(expected) == math.isfinite(ours) else math.inf
        else:
            error = abs(ours - expected) / (abs(expected) + 1e-30)
        ratio = ours / expected if expected and math.isfinite(ours) else None
        self._add((error, ours, expected, ratio), phase, step, name, note)

    def exact(self, phase: str, step: int, name: str, ours: Any, expected: Any, note: str = "") -> None:
        """Compare what must be equal to the bit: counts, decisions, scales."""
        got, want = (math.nan if x is None else float(x) for x in (ours, expected))
        ratio = got / want if want and math.isfinite(got) else None
        self._add((0.0 if ours == expected else math.inf, got, want, ratio), phase, step, name, note)

    def copies(self, phase: str, step: int, name: str, error: float) -> None:
        """How far the copies of a parameter are apart, relative to its largest element."""
        error = math.inf if math.isnan(error) else error
        note = "its copies differ between ranks" if error else ""
        self._add((error, math.nan, math.nan, None), phase, step, name, note)

    def _errors(self, pairs: Mapping[str, tuple[Tensor, Tensor]], largest: float) -> tuple[dict[str, float], float]:
        """The error of each tensor, of all at once: there are many small ones. And the size of the largest that is expected,
        be it of these or `largest` of others."""
        if not pairs:
            return {}, largest
        ours, expected = (
            np.concatenate([pair[i].detach().double().flatten().numpy() for pair in pairs.values()]) for i in (0, 1)
        )
        sizes = np.array([pair[0].numel() for pair in pairs.values()])
        starts = np.cumsum(sizes) - sizes

        def size(values: np.ndarray) -> np.ndarray:
            if self.tolerance.by_element:
                return np.maximum.reduceat(abs(values), starts)
            return np.sqrt(np.add.reduceat(values**2, starts) / sizes)

        with np.errstate(invalid="ignore"):  # infinities of an overflow
            wanted = size(expected)
            largest = max(largest, float(wanted.max()))
            errors = size(ours - expected) / (wanted + SMALL_TENSOR * largest + 1e-30)
        return dict(zip(pairs, np.where(np.isnan(errors), math.inf, errors).tolist(), strict=True)), largest

    def _detailed(self, phase: str, step: int, errors: Mapping[str, float]) -> set[str]:
        """Enter errors; which of them want to be told in detail: the worst of them and all that fail."""
        kind = self._kind(phase)
        bounds = {name: self.tolerance.bound(kind, step, name) for name in errors}
        for name, error in errors.items():
            key = (kind, step, name)
            self.errors[key] = max(self.errors.get(key, 0.0), error)
        worst = max(errors, key=lambda name: errors[name] / (bounds[name] or 1e-300), default=None)
        return {name for name, error in errors.items() if name == worst or not error <= bounds[name]}

    def _add(self, found: Found, phase: str, step: int, name: str, note: str) -> None:
        error, ours, expected, ratio = found
        kind = self._kind(phase)
        bound = self.tolerance.bound(kind, step, name)
        key = (kind, step, name)
        self.errors[key] = max(self.errors.get(key, 0.0), error)
        phase, part = (phase, "") if self.label is None else (self.label, phase)
        difference = Difference(phase, step, name, error, bound, ours, expected, ratio, note, part)
        known = self.worst.get(phase)
        if known is None or difference.excess > known.excess:
            self.worst[phase] = difference
        if difference.failed:
            self.failures.append(difference)

    def _kind(self, phase: str) -> str:
        return phase if self.label is None else f"{self.label} {phase}"

    def _compare(self, ours: Tensor, expected: Tensor, largest: float) -> Found:
        """Of two whole tensors; `largest` is the size of the largest of all."""
        if ours.shape != expected.shape:
            return NOTHING
        if expected.numel() == 0:
            return 0.0, math.nan, math.nan, None
        ours, expected = ours.detach().double().flatten(), expected.detach().double().flatten()
        difference = ours - expected
        at = int(difference.abs().nan_to_num(math.inf, math.inf).argmax())
        error = self._size(difference) / (self._size(expected) + SMALL_TENSOR * largest + 1e-30)
        error = math.inf if math.isnan(error) else error
        return error, float(ours[at]), float(expected[at]), _factor(ours, expected)

    def _size(self, tensor: Tensor) -> float:
        return float(tensor.abs().max() if self.tolerance.by_element else tensor.square().mean().sqrt())


def first_of(failures: Iterable[Difference]) -> list[Difference]:
    """The failures of the earliest phase of the earliest step, the worst one first; empty when there are none."""
    placed = [(place_of(d.phase, d.step, d.part), d) for d in failures]
    first = min((place for place, _ in placed), default=None)
    return sorted((d for place, d in placed if place == first), key=lambda d: -_size(d.error))


def place_of(phase: str, step: int, part: str = "") -> tuple[int, int, int]:
    """Sorts phases of steps by cause and effect: training first, step by step, then what follows it."""
    order = PHASES.index(phase)
    if order < PHASES.index("resume"):
        return 0, step, order
    return order, step, PHASES.index(part) if part else 0


def _size(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _factor(ours: Tensor, expected: Tensor) -> float | None:
    """The number that turns expected into ours, when there is one."""
    square = float(expected @ expected)
    if square == 0 or not bool(ours.isfinite().all()):
        return None
    factor = float(ours @ expected) / square
    rest = float((ours - factor * expected).abs().max()) / float(expected.abs().max())
    return factor if rest < 1e-6 and torch.isfinite(torch.tensor(factor)) else None
