"""What a planted fault is, and how to replace a part of the product."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Mutant:
    """A fault. `plant` runs in every rank of a layout, never in the reference, before the engine is built."""

    name: str
    reported: str
    """As people describe it."""
    layout: str
    plant: Callable[[], None]
    phase: str
    """Where verify must see it first."""
    cause: str
    """Words of the cause that verify must name."""
    axes: frozenset[str]
    """What the fault needs, as verify must find out."""
    family: str = "gpt"


def needs(*axes: str) -> frozenset[str]:
    """Axes of a layout, and settings."""
    return frozenset(axes)


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(what is there)` in its place."""
    setattr(owner, name, make(getattr(owner, name)))


def after(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Let ``then(result, *args, **kwargs)`` change what a function gives."""

    def make(original: Callable) -> Callable:
        def changed(*args: Any, **kwargs: Any) -> Any:
            return then(original(*args, **kwargs), *args, **kwargs)

        return changed

    replace(owner, name, make)


def in_backward() -> bool:
    """Whether autograd is at work."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def gradients_of(parameters: Any) -> list[torch.Tensor]:
    """Local gradients that are there."""
    return [p.gradient for p in parameters if p.gradient is not None]
