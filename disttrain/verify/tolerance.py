"""How large a difference may be: rounding in float64, or a multiple of the noise that one process has in less."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

EXACT = 1e-10
"""Largest relative error in float64."""

MULTIPLE = 4.0
"""In less than float64 an error may be this many times the noise floor."""

FLOOR_MICRO_BATCHES = (None, 8, 4, 2, 1)
"""Micro-batches of the one-process runs whose errors against float64 are the noise floor."""

ROUNDING = 2.0**-23
"""Noise floor of any quantity at least: weights, gradients and losses are kept in float32."""

Key = tuple[str, int, str]
"""(phase, step, name) of a quantity."""


class Tolerance(Protocol):
    """Which errors pass."""

    @property
    def by_element(self) -> bool:
        """Whether a tensor's error is that of its worst element, or the root of the mean square."""
        ...

    def together(self, phase: str, step: int) -> bool:
        """Whether all tensors of a phase count as one."""
        ...

    def bound(self, phase: str, step: int, name: str) -> float:
        """Largest relative error that passes."""
        ...


def drifted(phase: str, step: int) -> bool:
    """Whether gradients are compared at different weights: after the first update, unless they were just loaded."""
    return phase == "gradients" and step > 1


@dataclass(frozen=True)
class Exactly:
    """float64: the worst element within `EXACT`."""

    by_element: bool = True

    def together(self, phase: str, step: int) -> bool:
        """Never."""
        return False

    def bound(self, phase: str, step: int, name: str) -> float:
        """`EXACT`."""
        return EXACT


@dataclass(frozen=True)
class Measuring:
    """Everything passes, while noise is measured."""

    by_element: bool = False

    def together(self, phase: str, step: int) -> bool:
        """As where it is used."""
        return drifted(phase, step)

    def bound(self, phase: str, step: int, name: str) -> float:
        """Infinite."""
        return math.inf


@dataclass(frozen=True)
class Noise:
    """Less than float64: `MULTIPLE` times the noise of the same quantity, or the median noise of its phase."""

    floors: Mapping[tuple[str, str], float]
    """Noise by (phase, name), over all steps."""
    typical: Mapping[str, float]
    """Median noise by phase."""
    by_element: bool = False

    @classmethod
    def of(cls, errors: Mapping[Key, float]) -> "Noise":
        """From the largest errors that were met in any of the noise runs."""
        floors: dict[tuple[str, str], float] = {}
        for (phase, _, name), error in errors.items():
            floors[phase, name] = max(floors.get((phase, name), 0.0), error)
        phases = {phase for phase, _ in floors}
        typical = {
            phase: statistics.median(error for (of, _), error in floors.items() if of == phase) for phase in phases
        }
        return cls(floors, typical)

    def together(self, phase: str, step: int) -> bool:
        """Gradients at weights that have drifted from the reference's."""
        return drifted(phase, step)

    def bound(self, phase: str, step: int, name: str) -> float:
        """`MULTIPLE` times the floor."""
        return MULTIPLE * max(self.floors.get((phase, name), 0.0), self.typical.get(phase, 0.0), ROUNDING)
