"""The best layouts on so many ranks, and why the others are none. No torch.

For each size of the axes (tensor, pipeline, context) the fastest layout that fits is kept. Memory is compared for every
legal layout, by tables of what parameters and what activations take. Time is predicted for those that fit, in the order
of a bound (what their stages compute, and the pipeline's bubble), until the bound is no better than what was found.
`disttrain.layout.problems` has the last word on what is recommended.
"""

import math
from bisect import insort
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from disttrain import moments
from disttrain.config.schema import Config
from disttrain.costs import ActivationBytes
from disttrain.loggers.readable import GIB
from disttrain.planner import space
from disttrain.planner.execution import Execution
from disttrain.planner.footprint import Sharing
from disttrain.planner.prediction import Prediction, Predictor
from disttrain.planner.space import Axes, Cut
from disttrain.planner.speeds import Speeds
from disttrain.stages import SCHEDULES, virtual_stages
from disttrain.verify.layouts import Layout


class Rejection(NamedTuple):
    """Layouts that were rejected for the same reason."""

    reason: str
    """One sentence."""
    count: int
    nearest: str
    """The one that is nearest to being legal, or to fitting: its name, or what it would need."""


class Plan(NamedTuple):
    """What a search has found."""

    best: list[Prediction]
    """The fastest layout of each size of the axes, fastest first; all, or the first few that were asked for."""
    legal: int
    """Layouts that `disttrain check` would accept."""
    fitting: int
    """Of these: layouts that fit in memory."""
    timed: int
    """Of these: layouts whose time was predicted in full; the bound of the others said enough."""
    illegal: list[Rejection]
    too_large: list[Rejection]
    nearest: Layout | None
    """Of those that do not fit, the one that needs least."""


class _Miss(NamedTuple):
    """A layout that does not fit."""

    needed: float
    layout: Layout


class _Tally:
    """What a search counts while it goes on."""

    def __init__(self) -> None:
        self.legal = self.fitting = self.timed = 0
        self.too_large: dict[int, int] = {}
        self.misses: dict[int, _Miss] = {}
        """By ZeRO's stage, the one that needs least."""


def search(
    config: Config, world: int, speeds: Speeds, memory_bytes: float, execution: Execution | None = None,
    keep: int | None = None,
) -> Plan:  # fmt: skip
    """The config's vocabulary is resolved; `memory_bytes` is what a rank may use. Another code than this one has its own
    `execution`. Where only the first few are asked for, `keep` of them, others need not be timed."""
    predictor, tally = Predictor(config, world, speeds, execution), _Tally()
    best: list[Prediction] = []
    illegal: dict[str, list[Axes]] = {}
    for axes in space.all_axes(world):
        reason = space.why_not(config, world, axes)
        if reason:
            illegal.setdefault(reason, []).append(axes)
            continue
        limit = best[keep - 1].step_seconds if keep and len(best) >= keep else math.inf
        found = _best_of(predictor, axes, memory_bytes, limit, tally)
        if found is not None:
            insort(best, found, key=lambda prediction: prediction.step_seconds)
    nearest = min(tally.misses.values(), key=lambda miss: miss.needed, default=None)
    return Plan(
        best=[one for one in best if not one.layout.problems(config)],
        legal=tally.legal,
        fitting=tally.fitting,
        timed=tally.timed,
        illegal=[_illegal(config, world, found) for found in illegal.values()],
        too_large=[_too_large(predictor, zero, tally, memory_bytes) for zero in sorted(tally.too_large)],
        nearest=None if nearest is None else nearest.layout,
    )


class _Candidate(NamedTuple):
    """Choices that a micro-batch's work depends on, and the ZeRO stages with which they fit."""

    bound: float
    cut: Cut
    micro_batch: int
    recompute: str
    zeros: list[tuple[int, int]]


def _best_of(predictor: Predictor, axes: Axes, memory_bytes: float, limit: float, tally: _Tally) -> Prediction | None:
    """The fastest layout of these axes that fits; None where there is none, or none that may be faster than `limit`."""
    config, world, tables = predictor.config, predictor.world, _Tables(predictor, axes)
    candidates: list[_Candidate] = []
    for cut in space.cuts(config, axes):
        candidates += _fitting(tables, cut, memory_bytes, tally)
    candidates.sort(key=lambda candidate: candidate.bound)
    best: tuple[float, Layout] | None = None
    for bound, cut, sequences, recompute, zeros in candidates:
        if bound >= (limit if best is None else min(limit, best[0])):
            break
        for zero, replicas in zeros:
            layout = space.layout_of(config, world, axes, cut, zero, replicas, sequences, recompute)
            parts, _ = predictor.step(layout)
            tally.timed += 1
            seconds = sum(parts)
            if best is None or seconds < best[0]:
                best = seconds, layout
    return None if best is None else predictor.of(best[1])


class _Tables:
    """Bytes of all layouts of some axes: what parameters take, by ZeRO's stage, and what activations take, by
    micro-batch."""

    def __init__(self, predictor: Predictor, axes: Axes):
        self.predictor, self.axes = predictor, axes
        self.config, self.world = predictor.config, predictor.world
        self.sizes = space.micro_batch_sizes(self.config, self.world, axes)
        self.share = self.config.train.global_batch_size // axes.data(self.world)
        self.static, self.runtime, self.works = cache(self._static), cache(self._runtime), cache(self._works)

    def needed(self, cut: Cut, works: list[tuple[int, str]], zeros: tuple[tuple[int, int], ...]) -> np.ndarray:
        """Bytes of the worst rank [W, Z] for these micro-batches and recomputation, and these ZeRO stages."""
        footprint, pipeline = self.predictor.footprint, self.pipeline(cut)
        counts = [self.share // sequences for sequences, _ in works]
        held = [footprint.holding(*pipeline, count) for count in counts]
        block, head, passing = self.works(cut, tuple(works))
        several = np.array(counts)[:, None] > 1
        zero, ranks = np.array([zero for zero, _ in zeros]), self.axes.data(self.world) * self.axes.context
        sharing = moments.Sharing(zero, several, ranks > 1, self.axes.pipeline > 1, passing)
        needed = np.zeros((len(works), len(zeros)))
        for kind in range(len(held[0])):
            parameters, static, feedback = self.static(SCHEDULES[cut.schedule].placement, pipeline[2], kind, zeros)
            sharing = sharing._replace(undecided=feedback * footprint.skips)
            flight = moments.InFlight(
                *(np.array(column)[:, None] for column in zip(*(h[kind] for h in held), strict=True))
            )
            found = moments.moments(parameters, sharing, flight, block, head, *footprint.bytes)
            for moment in found.values():
                needed = np.maximum(needed, static + moment.total)
        return needed + self.runtime(zeros)

    def pipeline(self, cut: Cut) -> tuple[str, int, int]:
        """Schedule, ranks, stages of each."""
        ranks = self.axes.pipeline
        return cut.schedule, ranks, virtual_stages(cut.schedule, cut.virtual) if ranks > 1 else 1

    def _static(
        self, placement: str, virtual: int, kind: int, zeros: tuple[tuple[int, int], ...]
    ) -> tuple[moments.Parameters, np.ndarray, np.ndarray]:
        """Of one kind of rank: elements, bytes that are always there [Z], and residuals among them [Z]."""
        ranks = self.axes.data(self.world) * self.axes.context
        schedule = next(name for name, facts in SCHEDULES.items() if facts.placement == placement)
        found = []
        for zero, replicas in zeros:
            shards = ranks // replicas if zero else 1
            sharing = Sharing(self.axes.tensor, zero, shards, ranks // shards)
            found.append(self.predictor.footprint.static(schedule, self.axes.pipeline, virtual, kind, sharing))
        held = np.array([one.parameters.held for one in found])
        feedback = np.array([one.feedback for one in found], dtype=float)
        static = feedback + np.array([one.weights + one.optimizer for one in found], dtype=float)
        return found[0].parameters._replace(held=held), static, feedback

    def _runtime(self, zeros: tuple[tuple[int, int], ...]) -> np.ndarray:
        """[Z]."""
        cut = Cut(False, "ring", "1f1b", None)
        layouts = [space.layout_of(self.config, self.world, self.axes, cut, *zero, 1, "none") for zero in zeros]
        return np.array([self.predictor.footprint.runtime(layout) for layout in layouts])

    def _works(
        self, cut: Cut, works: tuple[tuple[int, str], ...]
    ) -> tuple[ActivationBytes, ActivationBytes, np.ndarray]:
        """Of a block, of the head, and between stages, each [W, 1]."""
        axes = self.axes.tensor, cut.sequence, self.axes.context, cut.context_method, self.axes.pipeline, cut.schedule
        found = [self.predictor.footprint.active(sequences, recompute, *axes) for sequences, recompute in works]
        table: Any = np.array([[*block, *head, passing] for block, head, passing in found])[:, :, None]
        return (
            ActivationBytes(*table[:, :3].swapaxes(0, 1)),
            ActivationBytes(*table[:, 3:6].swapaxes(0, 1)),
            table[:, 6],
        )


def _fitting(tables: _Tables, cut: Cut, memory_bytes: float, tally: _Tally) -> Iterator[_Candidate]:
    """Those of this cut that are legal and fit, with the bound of their time; the others are counted."""
    config, world, axes = tables.config, tables.world, tables.axes
    zeros = tuple(space.zero_stages(config, world, axes, cut))
    works = [
        (sequences, recompute)
        for sequences in tables.sizes
        for recompute in space.RECOMPUTE
        if space.schedule_takes(config, axes, cut, tables.share // sequences, recompute)
    ]
    if not zeros or not works:
        return
    needed = tables.needed(cut, works, zeros)
    fits = needed <= memory_bytes
    tally.legal += fits.size
    tally.fitting += int(fits.sum())
    if not fits.all():
        _count_misses(tables, cut, works, zeros, needed, tally, memory_bytes)
    for at in np.flatnonzero(fits.any(1)):
        sequences, recompute = works[at]
        work = (sequences, axes.tensor, cut.sequence, axes.context, cut.context_method == "ulysses", recompute)
        bound = tables.predictor.bound(tables.pipeline(cut), tables.share // sequences, work)
        yield _Candidate(bound, cut, sequences, recompute, [zeros[z] for z in np.flatnonzero(fits[at])])


def _count_misses(
    tables: _Tables, cut: Cut, works: list[tuple[int, str]], zeros: tuple[tuple[int, int], ...], needed: np.ndarray,
    tally: _Tally, memory_bytes: float,
) -> None:  # fmt: skip
    """By ZeRO's stage: how many do not fit, and which of them needs least."""
    missed = np.where(needed > memory_bytes, needed, np.inf)
    stages = np.array([zero for zero, _ in zeros])
    for zero in set(stages):
        mine = missed[:, stages == zero]
        count = int(np.isfinite(mine).sum())
        if not count:
            continue
        zero, least = int(zero), float(mine.min())
        tally.too_large[zero] = tally.too_large.get(zero, 0) + count
        if zero not in tally.misses or least < tally.misses[zero].needed:
            work, place = np.unravel_index(int(mine.argmin()), mine.shape)
            chosen = zeros[int(np.flatnonzero(stages == zero)[place])]
            layout = space.layout_of(tables.config, tables.world, tables.axes, cut, *chosen, *works[int(work)])
            tally.misses[zero] = _Miss(least, layout)


def _illegal(config: Config, world: int, found: list[Axes]) -> Rejection:
    """In the words of `disttrain check`, of the smallest."""
    smallest = min(found, key=lambda axes: (axes.tensor * axes.pipeline * axes.context, axes))
    layout = Layout(world, smallest.tensor, False, smallest.pipeline, "gpipe", None, smallest.context)
    problem = next(iter(layout.problems(config)), None)
    name = f"tensor {smallest.tensor}, pipeline {smallest.pipeline}, context {smallest.context}"
    return Rejection(problem.message if problem else "", len(found), name)


def _too_large(predictor: Predictor, zero: int, tally: _Tally, memory_bytes: float) -> Rejection:
    """What the one that needs least would need."""
    layout = tally.misses[zero].layout
    worst = predictor.footprint.worst(layout)
    where = f"pipeline rank {worst.stage}" if layout.pipeline > 1 else "a rank"
    nearest = f"{layout.name}: {where} needs {worst.total / GIB:.1f} GiB of {memory_bytes / GIB:.1f}"
    return Rejection(f"layouts with ZeRO {zero} do not fit", tally.too_large[zero], nearest)
