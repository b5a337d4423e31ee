"""Seconds of a call, by the median of rounds, and how far the rounds lie apart."""

import statistics
import time
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch

ROUNDS = 5
ROUND_SECONDS = 0.005
"""A round repeats its call until about so much has passed: a clock's tick, and a wait for the device, are nothing to it."""


class Timed(NamedTuple):
    """Seconds of one call."""

    seconds: float
    """Median of the rounds."""
    spread: float
    """(Largest - smallest) / median of the rounds, without the slowest one."""


def timed(call: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> Timed:
    """Time a call, after two that are not counted."""
    call()
    once = _seconds(call, 1, device)
    repeats = max(1, min(1000, ceil(ROUND_SECONDS / max(once, 1e-7))))
    return summary([_seconds(call, repeats, device) for _ in range(rounds)])


def summary(seconds: list[float]) -> Timed:
    """Of some rounds; one of them may have met with something else that the machine did."""
    median = statistics.median(seconds)
    kept = sorted(seconds)[: max(1, len(seconds) - 1)]
    return Timed(median, (kept[-1] - kept[0]) / median)


def wait(device: torch.device) -> None:
    """Until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - began) / repeats
