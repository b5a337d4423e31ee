"""Stages as whole numbers: placement, balance, limits and bubble, checked against torch's own schedules."""

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.config.presets import PRESETS
from disttrain.config.schema import ModelConfig
from disttrain.stages import (
    SCHEDULES,
    balanced,
    layers_of_stages,
    rank_of_stage,
    schedule_problems,
    stage_numbers,
    theoretical_bubble,
    virtual_stages,
)


def test_placement() -> None:
    assert stage_numbers("interleaved_1f1b", 1, 4, 3) == [1, 5, 9]
    assert stage_numbers("1f1b", 2, 4, 1) == [2]
    assert stage_numbers("zbv", 1, 4, 2) == stage_numbers("dualpipev", 1, 4, 2) == [1, 6]
    for schedule in SCHEDULES:
        for size in (2, 3, 4):
            virtual = virtual_stages(schedule)
            held = [stage_numbers(schedule, rank, size, virtual) for rank in range(size)]
            assert sorted(sum(held, [])) == list(range(size * virtual))
            assert all(rank_of_stage(schedule, s, size) == rank for rank in range(size) for s in held[rank])


def test_virtual_stages() -> None:
    assert [virtual_stages(s) for s in ("gpipe", "1f1b", "looped_bfs", "zbv")] == [1, 1, 2, 2]
    assert virtual_stages("interleaved_1f1b", 4) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(0, 20), st.integers(1, 7))
def test_no_cut_is_better(blocks: list[int], embedding: int, head: int, stages: int) -> None:
    if stages > len(blocks):
        with pytest.raises(ValueError, match="cannot fill"):
            balanced(blocks, embedding, head, stages)
        return

    def worst(ends: tuple[int, ...]) -> int:
        costs = [sum(blocks[a:b]) for a, b in zip((0, *ends), (*ends, len(blocks)), strict=True)]
        costs[0] += embedding
        costs[-1] += head
        return max(costs)

    found = balanced(blocks, embedding, head, stages)
    assert [layer for stage in found for layer in stage] == list(range(len(blocks)))
    assert all(found)
    best = min(worst(ends) for ends in combinations(range(1, len(blocks)), stages - 1))
    assert worst(tuple(stage.stop for stage in found[:-1])) == best


def test_the_head_has_its_weight() -> None:
    small = ModelConfig.model_validate({**PRESETS["gpt-10m"], "vocab_size": 256})
    large = ModelConfig.model_validate({**PRESETS["gpt-10m"], "vocab_size": 50257})
    assert [len(r) for r in layers_of_stages(small, 256, 2)] == [3, 3]
    assert [len(r) for r in layers_of_stages(large, 256, 2)] == [5, 1]
    assert [len(r) for r in balanced([1.0] * 7, 0, 0, 4)] in ([2, 2, 2, 1], [1, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2])


Action = tuple[str, int, int]
"""F, I (backward for inputs), W (for weights) or B (both); stage; micro-batch."""


def actions_of(schedule: str, size: int, virtual: int, micro_batches: int) -> dict[int, list[Action]]:
    """What each rank does and in which order, from torch itself; 1F1B, whose list torch does not keep, by hand."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    from disttrain.parallel.pipeline import TORCH_NAMES

    numbers = stage_numbers(schedule, 0, size, virtual)
    facts = {"num_stages": size * virtual, "group_size": size, "group_rank": 0, "submod": None}
    stages: list[Any] = [SimpleNamespace(stage_index=n, **facts) for n in numbers]
    one = schedule in ("gpipe", "1f1b")
    made: Any = get_schedule_class(TORCH_NAMES[schedule])(stages[0] if one else stages, micro_batches)
    if one:
        ahead = {r: size - r if schedule == "1f1b" else micro_batches for r in range(size)}
        return {r: one_stage(r, min(ahead[r], micro_batches), micro_batches) for r in range(size)}
    found: dict[int, list[Action]] = {}
    for rank, actions in made.pipeline_order.items():
        flat = [inner for action in actions if action for inner in (action.sub_actions or (action,))]
        found[rank] = [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in flat]
    return found


def one_stage(stage: int, ahead: int, micro_batches: int) -> list[Action]:
    """`ahead` forward passes, then alternating."""
    actions = [("F", stage, i) for i in range(ahead)]
    for i in range(micro_batches):
        actions.append(("B", stage, i))
        if ahead + i < micro_batches:
            actions.append(("F", stage, ahead + i))
    return actions


def simulated_bubble(actions: dict[int, list[Action]], stages: int) -> float:
    """Idle share when F, I and W take 1 and B takes 2; RuntimeError if the ranks wait for each other for ever."""
    seconds = {"F": 1, "I": 1, "W": 1, "B": 2}
    done: dict[tuple[str, int, int], int] = {}
    clock, at = dict.fromkeys(actions, 0), dict.fromkeys(actions, 0)
    left = sum(map(len, actions.values()))
    while left:
        before = left
        for rank, mine in actions.items():
            while at[rank] < len(mine):
                kind, stage, micro_batch = mine[at[rank]]
                needed = [("F", stage - 1, micro_batch)] if kind == "F" and stage else []
                if kind in "BI":
                    needed = [("I", stage + 1, micro_batch) if stage < stages - 1 else ("F", stage, micro_batch)]
                if kind == "W":
                    needed = [("I", stage, micro_batch)]
                if any(key not in done for key in needed):
                    break
                clock[rank] = max([clock[rank], *(done[key] for key in needed)]) + seconds[kind]
                done["I" if kind == "B" else kind, stage, micro_batch] = clock[rank]
                at[rank], left = at[rank] + 1, left - 1
        if left == before:
            raise RuntimeError("deadlock")
    busy = sum(seconds[kind] for mine in actions.values() for kind, _, _ in mine)
    return 1 - busy / (len(actions) * max(clock.values()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_limits_and_bubble_are_those_of_torch(schedule: str) -> None:
    """What is allowed runs without deadlock and idles as said; what is refused, torch refuses."""
    for size in (2, 3, 4, 6):
        for virtual in {virtual_stages(schedule, wanted) for wanted in (1, 2, 3)}:
            for micro_batches in range(1, 17):
                problems = schedule_problems(schedule, size, virtual, micro_batches, size * virtual)
                if problems:
                    with pytest.raises(ValueError, match="micro"):
                        actions_of(schedule, size, virtual, micro_batches)
                    continue
                found = simulated_bubble(actions_of(schedule, size, virtual, micro_batches), size * virtual)
                expected = theoretical_bubble(schedule, size, virtual, micro_batches)
                assert found == pytest.approx(expected), (size, virtual, micro_batches)


def test_bubble_of_the_papers() -> None:
    assert theoretical_bubble("gpipe", 4, 1, 8) == theoretical_bubble("1f1b", 4, 1, 8) == pytest.approx(3 / 11)
    assert theoretical_bubble("interleaved_1f1b", 4, 2, 8) == pytest.approx(3 / (2 * 8 + 3))
    assert theoretical_bubble("zbv", 4, 2, 8) == pytest.approx(3 / (6 * 8 + 3))


def test_problems_name_what_is_wrong() -> None:
    assert schedule_problems("1f1b", 1, 1, 1, 1) == []
    (problem,) = schedule_problems("interleaved_1f1b", 4, 2, 8, 7)
    assert problem.settings == ("parallel.pipeline=4", "model.layers=7")
    (problem,) = schedule_problems("dualpipev", 4, 2, 7, 8)
    assert "at least 8 micro-batches" in problem.message
    assert schedule_problems("dualpipev", 4, 2, 8, 8) == []
    assert len(schedule_problems("1f1b", 4, 1, 3, 3)) == 2
    (problem,) = schedule_problems("interleaved_zero_bubble", 4, 2, 9, 8)
    assert "2 rounds, which are not equal" in problem.message
    for schedule, facts in SCHEDULES.items():
        problems = schedule_problems(schedule, 2, virtual_stages(schedule), 4, 8, recompute="full", compiled=True)
        assert len(problems) == 2 * facts.splits_backward
