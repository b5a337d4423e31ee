"""Pipeline stages as whole numbers: schedules, who holds which stage, which layers a stage has, the bubble (no torch).

Letters: P pipeline ranks, v stages a rank holds (virtual stages), M micro-batches of a step on one data rank.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf
from typing import Literal, NamedTuple

from disttrain.config.problems import Problem
from disttrain.config.schema import ModelConfig
from disttrain.costs import forward_flops_per_sequence

DEFAULT_VIRTUAL_STAGES = 2


class Schedule(NamedTuple):
    """What distinguishes one pipeline schedule."""

    placement: Literal["loop", "v"]
    """loop: rank r holds stages r, r + P, ...; v: stages r and 2 P - 1 - r, so that the last meets the first."""
    virtual_stages: int | None
    """Stages a rank holds; None where the user chooses."""
    splits_backward: bool
    """Whether gradients of inputs and of weights are computed apart, at different times."""


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule("loop", 1, False),
    "1f1b": Schedule("loop", 1, False),
    "interleaved_1f1b": Schedule("loop", None, False),
    "looped_bfs": Schedule("loop", None, False),
    "interleaved_zero_bubble": Schedule("loop", None, True),
    "zbv": Schedule("v", 2, True),
    "dualpipev": Schedule("v", 2, True),
}
"""Huang et al. 2019 (GPipe); Narayanan et al. 2021 (1F1B, interleaved); Lamy-Poirier 2023 (breadth first); Qi et al.
2024 (zero bubble, its interleaved ZB1P form and V form); DeepSeek-AI 2024 (DualPipe, here its V form)."""


def virtual_stages(schedule: str, wanted: int | None = None) -> int:
    """Stages each rank holds: the schedule's own number, or `wanted`, 2 by default, where there is a choice."""
    fixed = SCHEDULES[schedule].virtual_stages
    return fixed or wanted or DEFAULT_VIRTUAL_STAGES


def stage_numbers(schedule: str, pipeline_rank: int, pipeline_size: int, virtual: int) -> list[int]:
    """Stages that one pipeline rank holds, ascending."""
    if SCHEDULES[schedule].placement == "v":
        return [pipeline_rank, 2 * pipeline_size - 1 - pipeline_rank]
    return [pipeline_rank + i * pipeline_size for i in range(virtual)]


def rank_of_stage(schedule: str, stage: int, pipeline_size: int) -> int:
    """Pipeline rank that holds a stage."""
    if SCHEDULES[schedule].placement == "v":
        return min(stage, 2 * pipeline_size - 1 - stage)
    return stage % pipeline_size


def layers_of_stages(
    model: ModelConfig, sequence_length: int, stages: int, predicted_tokens: float | None = None
) -> list[range]:
    """Blocks of every stage, such that the most expensive stage, counted in matrix products, is as cheap as can be.

    The head weighs on the last stage: for a large vocabulary it costs as much as several blocks. Embeddings are looked
    up, which costs nothing here. predicted_tokens as in `disttrain.costs`. Raises ValueError for more stages than blocks.
    """
    flops = forward_flops_per_sequence(model, sequence_length, True, predicted_tokens)
    block = (flops.block_linears + flops.attention) / model.layers
    return balanced([block] * model.layers, 0.0, flops.head, stages)


def balanced(blocks: Sequence[float], embedding: float, head: float, stages: int) -> list[range]:
    """Cut blocks of these costs into runs, one a stage and none empty, with the embedding first and the head last.

    The largest stage is as small as possible; among those cuts the sum of squares is least, so that the other stages
    are even too. Dynamic programming, O(stages x blocks^2). Raises ValueError for more stages than blocks.
    """
    if not 1 <= stages <= len(blocks):
        raise ValueError(f"{len(blocks)} blocks cannot fill {stages} stages")
    before = [0.0, *accumulate(blocks)]

    def cost_of(stage: int, start: int, end: int) -> float:
        return before[end] - before[start] + embedding * (stage == 0) + head * (stage == stages - 1)

    largest, _ = _best_cut(len(blocks), stages, cost_of, max)
    limit = largest * (1 + 1e-9)
    _, ends = _best_cut(len(blocks), stages, cost_of, lambda sum, cost: sum + cost**2 if cost <= limit else inf)
    return [range(start, end) for start, end in pairwise([0, *ends])]


def _best_cut(
    count: int,
    stages: int,
    cost_of: Callable[[int, int, int], float],
    add: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least value of `add` over the stages' costs, and the ends of the stages that give it."""
    found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(stages):
        last = stage == stages - 1
        options: dict[int, tuple[float, list[int]]] = {}
        for end in range(count if last else stage + 1, count - (stages - stage - 1) + 1):
            values = {at: add(found[at][0], cost_of(stage, at, end)) for at in found if at < end}
            start = min(values, key=values.__getitem__)
            options[end] = (values[start], [*found[start][1], end])
        found = options
    return found[count]


def theoretical_bubble(schedule: str, pipeline_size: int, virtual: int, micro_batches: int) -> float:
    """Idle share of a step, from 0 to 1, on equal stages where each of these takes as long: forward, backward for
    inputs, backward for weights; sending takes no time.

    GPipe and 1F1B: (P - 1) / (M + P - 1), divided by about v when interleaved (Narayanan et al. 2021, 2.2); a third of
    that where weights' gradients fill the gaps (Qi et al. 2024; at least 2 P - 1 micro-batches for the V form). Short
    steps, where M is below that, are counted too: the span is the longest of the ways through the schedule.
    """
    p, v, m = pipeline_size, virtual, micro_batches
    if not SCHEDULES[schedule].splits_backward:
        span, work = 3 * ((v - 1) * max(m, p) + m + p - 1), 3 * v * m
    elif SCHEDULES[schedule].placement == "v":
        span, work = max(6 * m + p - 1, 4 * m + 4 * p - 2), 6 * m
    else:
        work = 3 * v * m
        span = max(work + p - 1, 2 * v * m + v * p + p - 1, 2 * m + 2 * v * p - 1)
    return 1 - work / span


def schedule_problems(
    schedule: str,
    pipeline_size: int,
    virtual: int,
    micro_batches: int,
    layers: int,
    recompute: str = "none",
    compiled: bool = False,
) -> list[Problem]:
    """Why this schedule cannot run; empty when it can. micro_batches are those of one data rank in one step."""
    problems = [] if pipeline_size == 1 else _size_problems(schedule, pipeline_size, virtual, micro_batches, layers)
    if pipeline_size > 1 and SCHEDULES[schedule].splits_backward:
        problems += _split_problems(schedule, recompute, compiled)
    return problems


def _size_problems(schedule: str, p: int, v: int, m: int, layers: int) -> list[Problem]:
    name, ranks = f"parallel.schedule={schedule}", f"parallel.pipeline={p}"
    problems = []
    if p * v > layers:
        held = "" if v == 1 else f" ({v} on each rank)"
        problems.append(
            Problem(
                (ranks, f"model.layers={layers}"),
                f"{layers} layers cannot fill {p * v} stages{held}",
                "use fewer ranks or stages a rank, or a deeper model",
            )
        )
    least = {"1f1b": p, "dualpipev": 2 * p}.get(schedule, 1)
    if m < least:
        problems.append(
            Problem(
                (name, ranks),
                f"this schedule needs at least {least} micro-batches on each data rank in a step, there are {m}",
                "make train.micro_batch_size smaller or train.global_batch_size larger, or use parallel.schedule=gpipe",
            )
        )
    rounds = max(1, m // p)
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and m % rounds:
        problems.append(
            Problem(
                (name, ranks),
                f"this schedule takes the {m} micro-batches of a data rank in {rounds} rounds, which are not equal",
                f"have a multiple of {p} micro-batches in a step, or use parallel.schedule=looped_bfs",
            )
        )
    return problems


def _split_problems(schedule: str, recompute: str, compiled: bool) -> list[Problem]:
    """What goes badly with two halves of the backward pass: measured on torch 2.13."""
    name, problems = f"parallel.schedule={schedule}", []
    if recompute == "full":
        problems.append(
            Problem(
                (name, "parallel.recompute=full"),
                "this schedule computes the gradients of weights later and one by one, and a block would be computed "
                "again for each of them: up to 8 forward passes instead of 2",
                "use parallel.recompute=selective, or parallel.schedule=1f1b or interleaved_1f1b",
            )
        )
    if compiled:
        problems.append(
            Problem(
                (name, "run.compile=true"),
                "this schedule runs the halves of the backward pass apart, which a compiled block cannot",
                "use run.compile=false, or parallel.schedule=1f1b or interleaved_1f1b",
            )
        )
    return problems
