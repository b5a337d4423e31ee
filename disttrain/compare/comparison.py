"""Strategies side by side: medians over repeats, losses at equal points, the Pareto front. Pure; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from disttrain.compare.measures import Curve, Values, cost_per_million_tokens, curve, loss_at, measure, middle
from disttrain.report import Run

LEARNS_LESS = 0.01
"""Share above the baseline's loss at equal tokens from which a strategy is said to learn less."""


@dataclass(frozen=True)
class Group:
    """The runs of one strategy."""

    name: str
    about: str | None
    settings: list[str]
    """What it sets differently from the others, as words."""
    command: str | None
    """A command that trains so; None where it is not known."""
    runs: list[Run]
    """Its repeats that are done, at least one."""


@dataclass(frozen=True)
class Measured:
    """One strategy that ran, and its numbers."""

    group: Group
    each: list[Values]
    """Numbers of each repeat."""
    values: Values
    """Medians over the repeats, and what follows from them and from the other strategies."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.group.name

    @cached_property
    def curve(self) -> Curve:
        """Loss of the repeat whose throughput is the median, or just below it."""
        order = sorted(range(len(self.each)), key=lambda i: self.each[i]["tokens_per_second"] or 0.0)
        return curve(self.group.runs[order[(len(order) - 1) // 2]])

    @property
    def spread(self) -> float | None:
        """Distance of its slowest and fastest repeat as a share of the median; None of a single one."""
        v = self.values
        low, high, mid = v["tokens_per_second_min"], v["tokens_per_second_max"], v["tokens_per_second"]
        return (high - low) / mid if len(self.each) > 1 and low and high and mid else None


@dataclass(frozen=True)
class NotRun:
    """A strategy, or one repeat of it, without a result."""

    name: str
    about: str | None
    state: str
    reason: str
    log: str | None
    """Where there is more to read, below the comparison's folder."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    name: str
    baseline: str
    """Strategy that ratios are relative to; the first that ran, where the one asked for did not."""
    strategies: list[Measured]
    not_run: list[NotRun]
    equal_tokens: float
    """Tokens that all runs have seen: the fewest of any run."""
    equal_seconds: float
    """Seconds inside steps that all runs have trained: the fewest of any run."""
    on_device: bool
    """Whether memory is that of devices, which it is where every run has recorded it; else it is that of hosts."""
    price_per_rank_hour: float | None
    currency: str
    front: frozenset[str]
    """Strategies that are on the Pareto front of throughput and memory."""

    def strategy(self, name: str) -> Measured:
        """The strategy of this name."""
        return next(s for s in self.strategies if s.name == name)

    @property
    def headers(self) -> list[dict[str, Any]]:
        """Header of the newest process of every run."""
        return [run.header for s in self.strategies for run in s.group.runs]


def compared(
    name: str, groups: Sequence[Group], not_run: list[NotRun], baseline: str, price: float | None, currency: str
) -> Comparison:
    """Measure every run and set the strategies side by side. `price` is that of a rank for an hour."""
    curves = [curve(run) for group in groups for run in group.runs]
    tokens, seconds = min(c.tokens[-1] for c in curves), min(c.seconds[-1] for c in curves)
    each = {group.name: [_numbers(run, tokens, seconds, price) for run in group.runs] for group in groups}
    on_device = all(values["device_bytes"] is not None for runs in each.values() for values in runs)
    if baseline not in each:
        baseline = groups[0].name
    base = middle([values["tokens_per_second"] for values in each[baseline]])
    strategies = [Measured(g, each[g.name], _medians(each[g.name], base, on_device)) for g in groups]
    points = {s.name: (s.values["tokens_per_second"], s.values["memory_bytes"]) for s in strategies}
    return Comparison(name, baseline, strategies, not_run, tokens, seconds, on_device, price, currency,
                      pareto_front(points))  # fmt: skip


def _numbers(run: Run, tokens: float, seconds: float, price: float | None) -> Values:
    """Numbers of one run, at the points that all runs have reached."""
    values, c = measure(run), curve(run)
    return values | {
        "loss_at_equal_tokens": loss_at(c.tokens, c.loss, tokens),
        "loss_at_equal_seconds": loss_at(c.seconds, c.loss, seconds),
        "cost_per_million_tokens": cost_per_million_tokens(price, values["ranks"], values["tokens_per_second"]),
    }


def _medians(each: Sequence[Values], base: float | None, on_device: bool) -> Values:
    """Numbers of one strategy; `base` is the baseline's throughput."""
    medians = {key: middle([values[key] for values in each]) for key in each[0]}
    rates = [rate for values in each if (rate := values["tokens_per_second"]) is not None]
    rate = medians["tokens_per_second"]
    return medians | {
        "repeats": len(each),
        "tokens_per_second_min": min(rates, default=None),
        "tokens_per_second_max": max(rates, default=None),
        "ratio": rate / base if rate and base else None,
        "memory_bytes": medians["device_bytes" if on_device else "host_bytes"],
    }


def pareto_front(points: Mapping[str, tuple[float | None, float | None]]) -> frozenset[str]:
    """Names of (throughput, memory) that no other beats: as fast with as little memory, and better in one of the two."""
    known = {name: (rate, memory) for name, (rate, memory) in points.items() if rate is not None and memory is not None}

    def beaten(rate: float, memory: float) -> bool:
        return any(r >= rate and m <= memory and (r > rate or m < memory) for r, m in known.values())

    return frozenset(name for name, point in known.items() if not beaten(*point))


def largest_spread(comparison: Comparison) -> tuple[str, float] | None:
    """The strategy whose repeats differ most in throughput, and by what share; None where nothing was repeated."""
    spreads = [(s.name, s.spread) for s in comparison.strategies if s.spread is not None]
    return max(spreads, key=lambda pair: pair[1], default=None)


def typical_spread(comparison: Comparison) -> float | None:
    """Median over the strategies of the spread of their repeats; None where nothing was repeated."""
    spreads = [s.spread for s in comparison.strategies if s.spread is not None]
    return median(spreads) if spreads else None


def learns_less(comparison: Comparison, strategy: Measured) -> float | None:
    """By what share its loss at equal tokens is above the baseline's, where that is more than `LEARNS_LESS`."""
    key = "loss_at_equal_tokens"
    ours, base = strategy.values[key], comparison.strategy(comparison.baseline).values[key]
    if ours is None or base is None:
        return None
    if math.isnan(ours):
        return math.inf
    return ours / base - 1 if ours > (1 + LEARNS_LESS) * base else None
