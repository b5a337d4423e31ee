"""The seconds of a step by kind, and its memory, on made-up traces of a CPU and of a GPU whose answers are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain import ranges
from disttrain.config.checks import validate
from disttrain.config.load import with_values
from disttrain.config.profile import ProfileConfig
from disttrain.config.schema import Config
from disttrain.profiling import memory, session, table
from disttrain.profiling.activity import activities
from disttrain.profiling.intervals import common, seconds, union, without
from disttrain.profiling.profile import window
from disttrain.profiling.seconds import AXES, COMPUTING, ROWS, Activity, on_the_way, step_rows

MAIN, OTHER = 7, 8


def event(name: str, start: float, end: float, tid: int = MAIN, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """Milliseconds."""
    return {"ph": "X", "name": name, "ts": start * 1e3, "dur": (end - start) * 1e3, "tid": tid, "pid": 1, "cat": cat,
            "args": args}  # fmt: skip


def ours(name: str, start: float, end: float, tid: int = MAIN) -> dict[str, Any]:
    return event(f"disttrain.{name}", start, end, tid, "user_annotation")


ticks = st.tuples(st.integers(0, 60), st.integers(0, 60))
moments = st.lists(ticks.map(lambda ends: (min(ends), max(ends))), max_size=9)


@given(moments, moments)
def test_sets_of_moments(a: list, b: list) -> None:
    def inside(intervals: list) -> set[int]:
        return {tick for start, end in intervals for tick in range(start, end)}

    a_, b_ = union(a), union(b)
    assert inside(a_) == inside(a)
    assert inside(union(a, b)) == inside(a) | inside(b)
    assert inside(common(a_, b_)) == inside(a) & inside(b)
    assert inside(without(a_, b_)) == inside(a) - inside(b)
    assert seconds(without(a_, b_)) + seconds(common(a_, b_)) == seconds(a_)


@given(st.lists(moments, min_size=11, max_size=11))
def test_kinds_add_up_to_the_step_whatever_overlaps(parts: list[list]) -> None:
    sets = [union(part) for part in parts]
    did = Activity(10, 50, dict(zip(COMPUTING, sets, strict=False)), dict(zip(AXES, sets[4:], strict=False)), sets[-1])
    rows = step_rows(did)
    assert tuple(rows) == ROWS
    assert sum(rows.values()) == pytest.approx(40)
    assert min(rows.values()) >= 0
    ways = on_the_way(did)
    assert all(ways[axis] >= rows[f"exposed {axis}"] for axis in AXES)


def cpu_step() -> list[dict[str, Any]]:
    """100 ms: data 0-10, the engine 10-90 (tensors 10-14, forward 14-40, backward 40-80, update 80-90), a vote, the rest."""
    return [
        ours("step 5", 0, 100), ours("data", 0, 10), ours("engine", 10, 90), event("aten::copy_", 11, 13),
        ours("forward micro-batch 0", 14, 40), event("aten::mm", 14, 24), event("aten::mm", 30, 40),
        ours("backward micro-batch 0", 40, 80), event("autograd::engine::evaluate_function: MmBackward0", 40, 80),
        event("aten::mm", 40, 70), event("aten::_fused_adamw_", 82, 90),
        # a tensor collective that is waited for: 24-29, and Python goes on to 30
        ours("communication tensor gloo:all_reduce", 24, 29), event("c10d::allreduce_", 24, 24.1),
        # a bucket of gradients, begun at 50 and hidden up to 70, waited for up to 78
        ours("communication data gloo:all_reduce", 50, 78), event("c10d::allreduce_", 50, 50.1),
        # one that ends while something is computed hides altogether
        ours("communication data gloo:all_reduce", 42, 48, OTHER),
        ours("communication world gloo:all_reduce", 92, 95), event("c10d::allreduce_", 92, 92.1),
    ]  # fmt: skip


def test_a_step_on_a_cpu() -> None:
    (did,) = activities(cpu_step(), "cpu")
    rows = {row: round(value * 1e3, 6) for row, value in step_rows(did).items()}
    assert rows["exposed tensor"] == 5
    assert rows["exposed data"] == 8
    assert rows["exposed world"] == 3
    assert rows["forward"] == 26 - 5
    assert rows["backward"] == 40 - 8
    assert rows["optimizer"] == 10
    assert rows["loading"] == 14
    assert rows["idle"] == 10 - 3
    assert sum(rows.values()) == pytest.approx(100)
    ways = {axis: round(value * 1e3, 6) for axis, value in on_the_way(did).items() if value}
    assert ways == {"tensor": 5, "data": 34, "world": 3}


def test_a_pipeline_on_a_cpu_waits_for_its_neighbour_outside_of_its_passes() -> None:
    """gloo's messages carry no name; those inside a range of ours are the ring's."""
    (did,) = activities([
        ours("step 1", 0, 50), ours("engine", 0, 50),
        event("gloo:recv", 1, 20, cat="user_annotation"), ours("forward stage 1 micro-batch 0", 20, 30),
        event("aten::mm", 20, 24), ours("communication context gloo:send_and_receive", 24, 24.2),
        event("gloo:send", 24.1, 29, cat="user_annotation"), event("aten::mm", 29, 30),
        ours("backward stage 1 micro-batch 0", 30, 40), event("aten::mm", 30, 40),
        event("gloo:send", 35, 44, cat="user_annotation"), event("aten::_fused_adamw_", 40, 50),
    ], "cpu")  # fmt: skip
    rows = {row: round(value * 1e3, 6) for row, value in step_rows(did).items()}
    assert (rows["exposed pipeline"], rows["exposed context"]) == (
        19,
        4.9,
    )  # the last message goes on beside the update
    assert (rows["loading"], rows["forward"], rows["backward"], rows["optimizer"]) == (1, 5.1, 10, 10)


def test_a_collective_that_torch_calls_itself_lasts_until_the_next_operator() -> None:
    """FSDP2 between replicas: no range of ours is around it."""
    (did,) = activities([
        ours("step 1", 0, 20), ours("engine", 0, 20), ours("forward", 0, 5), event("aten::mm", 0, 5),
        ours("backward", 5, 20), event("aten::mm", 5, 8), ours("communication data gloo:reduce_scatter", 8, 10),
        event("c10d::_reduce_scatter_base_", 8, 8.1), event("c10d::allreduce_", 11, 11.1), event("aten::add_", 17, 20),
    ], "cpu")  # fmt: skip
    assert round(step_rows(did)["exposed data"] * 1e3, 6) == 2 + 6


def test_a_step_on_a_gpu() -> None:
    """Kernels say when it computes, launches in which phase; NCCL's are of the axis in whose range they were launched."""
    launched = {
        1: (12, MAIN),
        2: (15, MAIN),
        3: (22, OTHER),
        4: (24, OTHER),
        5: (26, MAIN),
        6: (40, MAIN),
        7: (5, MAIN),
    }
    calls = [
        event("cudaLaunchKernel", at, at + 0.1, tid, "cuda_runtime", correlation=n) for n, (at, tid) in launched.items()
    ]
    kernels = [
        event("gemm", 20, 30, 77, "kernel", correlation=1),
        event("ncclDevKernel_AllReduce_Sum", 30, 34, 77, "kernel", correlation=2),
        event("gemm_backward", 34, 60, 77, "kernel", correlation=3),
        event("ncclDevKernel_ReduceScatter_Sum", 50, 66, 78, "kernel", correlation=4),
        event("ncclDevKernel_SendRecv", 66, 70, 78, "kernel", correlation=5),
        event("adamw", 72, 80, 77, "kernel", correlation=6),
        event("Memcpy HtoD", 8, 9, 77, "gpu_memcpy", correlation=7),
    ]
    (did,) = activities([
        ours("step 9", 0, 90), ours("data", 0, 10), ours("engine", 10, 45), ours("forward micro-batch 0", 11, 20),
        ours("communication tensor nccl:all_reduce", 14.9, 15.2), ours("backward micro-batch 0", 20, 38),
        ours("communication data nccl:reduce_scatter", 23.9, 24.2, OTHER),
        ours("communication world gloo:all_reduce", 84, 86),
        *calls, *kernels,
    ], "cuda")  # fmt: skip
    rows = {row: round(value * 1e3, 6) for row, value in step_rows(did).items()}
    expected = {"forward": 10, "backward": 26, "optimizer": 8, "other": 1, "exposed tensor": 4, "exposed data": 6,
                "exposed pipeline": 4, "exposed world": 2}  # fmt: skip
    assert {row: rows[row] for row in expected} == expected
    assert rows["loading"] == 9 + 1  # 0-8, 9-10; and 10-11, before the first pass
    assert sum(rows.values()) == pytest.approx(90)
    assert round(on_the_way(did)["data"] * 1e3, 6) == 16


def test_without_a_step_there_is_no_activity() -> None:
    assert activities([event("aten::mm", 0, 1)], "cpu") == []


def test_a_gpu_whose_kernels_are_not_seen_is_not_called_idle() -> None:
    with pytest.raises(RuntimeError, match="administrators only"):
        activities(cpu_step(), "cuda")


def test_what_is_on_its_way_has_lanes_of_its_own() -> None:
    message = event("gloo:send", 41, 44, cat="user_annotation")
    shown = session.with_lanes([*cpu_step(), message])
    lanes = [e for e in shown if e["ph"] in "be"]
    assert {e["cat"] for e in lanes} == {
        "communication tensor",
        "communication data",
        "communication world",
        "messages",
    }
    assert [e["ph"] for e in lanes].count("b") == [e["ph"] for e in lanes].count("e") == 5
    assert len({(e["cat"], e["id"]) for e in lanes}) == 5
    assert len(shown) == len(cpu_step()) + 1 + 5


def test_a_range_is_nothing_while_nobody_looks() -> None:
    first, second = ranges.named("forward", 1), ranges.named("backward")
    assert first is second
    with ranges.communication("tensor", "all_reduce", torch.device("cpu")) as until:
        assert until("work") == "work"


def allocation(address: int, size: int, at: float, device: int = 0, total: int = 0) -> dict[str, Any]:
    return {"ph": "i", "name": "[memory]", "ts": at * 1e3, "tid": MAIN, "args": {
        "Addr": address, "Bytes": size, "Device Type": device, "Total Allocated": total}}  # fmt: skip


def kept(**pieces: dict[int, int]) -> memory.Kept:
    return memory.Kept({name: pieces.get(name, {}) for name in ("weights", "optimizer", "gradients")})


def memory_step(device: int = 0) -> list[dict[str, Any]]:
    return [
        ours("step 4", 0, 100), ours("engine", 5, 95), ours("forward micro-batch 0", 10, 40),
        event("FSDP::all_gather (x)", 12, 16, cat="user_annotation"),
        ours("backward micro-batch 0", 40, 80), ours("reduced", 81, 81),
        allocation(1, 100, 13, device, 1100), allocation(2, 7, 20, device), allocation(2, -7, 21, device),
        allocation(3, 30, 22, device), allocation(4, 50, 50, device), allocation(3, -30, 60, device),
        allocation(1, -100, 70, device), allocation(2, 8, 72, device), allocation(2, -8, 74, device),
        allocation(5, 20, 85, device), allocation(4, -50, 90, device), allocation(99, -5, 91, device),
        allocation(6, 1000, 30, 1 - device),
    ]  # fmt: skip


def test_memory_by_category() -> None:
    """Gathered at 13, activations 22 to 60, a gradient 50 to 90, an optimizer's first moment from 85 on."""
    line = memory.timeline(
        memory_step(), "cpu", kept(weights={50: 200}), kept(weights={50: 200}, gradients={4: 50, 60: 25}),
        kept(weights={50: 200}, optimizer={5: 20}),
    )  # fmt: skip
    assert line is not None
    assert line.live["weights"] == [200] * 12
    assert line.live["gathered weights"][1] == 100 and line.live["gathered weights"][-1] == 0
    assert max(line.live["activations"]) == 30 and max(line.live["other"]) == 8
    assert line.live["gradients"][0] == 25  # in memory that stays, as DDP's buckets
    assert max(line.live["gradients"]) == 75 and line.live["gradients"][-1] == 25
    assert line.live["optimizer"][-1] == 20
    assert line.at_peak() == {
        "bytes": {"weights": 200, "optimizer": 0, "gradients": 75, "gathered weights": 100, "activations": 30, "other": 0},
        "total_bytes": 405, "seconds": pytest.approx(0.05), "phase": "backward",
    }  # fmt: skip
    assert [name for name, _, _ in line.phases] == ["forward", "backward", "optimizer"]


def test_a_gpu_knows_what_else_it_holds(tmp_path: Path) -> None:
    line = memory.timeline(memory_step(1), "cuda", kept(weights={50: 200}), kept(), kept())
    assert line is not None
    assert line.live["other"][0] == 1000 - 200
    path = tmp_path / "memory.png"
    memory.draw(line, "memory of rank 0 in step 4", path)
    assert path.stat().st_size > 10_000


def test_memory_that_tensors_share_counts_once() -> None:
    whole = torch.zeros(8)
    found = memory.Kept.of({"weights": [whole[:4], whole[4:]], "optimizer": [whole, torch.ones(2)]}, "cpu")
    assert [sum(pieces.values()) for pieces in found.pieces.values()] == [32, 0, 8]


@pytest.mark.parametrize(
    ("steps", "begins", "total", "expected"),
    [
        (None, 1, 100, (5, 7)), (None, 51, 100, (55, 57)), (None, 1, 3, (2, 3)), (None, 1, 5, (3, 5)),
        (None, 1, 1, None), (None, 100, 100, None), ([10, 12], 1, 100, (10, 12)), ([10, 12], 11, 100, (12, 12)),
        ([10, 12], 13, 100, None), ([2, 2], 1, 2, (2, 2)),
    ],
)  # fmt: skip
def test_which_steps_are_looked_at(steps: list[int] | None, begins: int, total: int, expected: Any) -> None:
    """Of a process whose first step is `begins`: the step before them is needed too."""
    assert window(ProfileConfig(enabled=True, steps=steps), begins, total) == expected


def problems(**profile: Any) -> list[str]:
    config = with_values(Config(), {"train.steps": 20, **{f"profile.{key}": value for key, value in profile.items()}})
    return [problem.message for problem in validate(config, 2)]


def test_profiles_that_cannot_be_are_refused() -> None:
    assert problems(enabled=True, steps=[19, 20], ranks=[0, 1]) == []
    assert any("no effect" in message for message in problems(steps=[4, 5]))
    assert any("no effect" in message for message in problems(ranks=[0]))
    assert any("must be 2 or later" in message for message in problems(enabled=True, steps=[1, 3]))
    assert any("not after the last" in message for message in problems(enabled=True, steps=[5, 4]))
    assert any("the run ends before" in message for message in problems(enabled=True, steps=[19, 21]))
    assert any("there is no rank 2, 9" in message for message in problems(enabled=True, ranks=[0, 2, 9]))


def of_rank(rank: int, **rows: float) -> table.RankSeconds:
    whole = {**dict.fromkeys(ROWS, 0.0), **rows}
    ways: dict[str, float | None] = {**dict.fromkeys(AXES, 0.0), "data": None if rank else 0.5}
    return table.RankSeconds(rank, "host", sum(whole.values()), whole, ways)


def test_the_table_is_of_the_mean_and_of_the_rank_with_the_most_work() -> None:
    ranks = [of_rank(0, forward=1.0, idle=2.0, loading=0.5), of_rank(1, forward=2.0, idle=1.0, loading=0.5)]
    found = table.summarised([5, 6], "cpu", ranks, (5, 7))
    assert (found["worst_rank"], found["complete"]) == (1, False)
    assert sum(found["seconds_mean"].values()) == found["step_seconds_mean"] == 3.5
    assert found["on_the_way_seconds_mean"]["data"] is None  # one rank does not see it
    shown = table.table(found, 3.25)
    assert shown.title == "a step by kind, steps 5 to 6, 3.25 s without a profile"
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["forward", "exposed: data", "loading data", "idle", "step"]
    assert cells[3] == ["2 s", "0 ms", "500 ms", "1 s", "3.5 s"]
    assert cells[4][1] == "not seen"


def test_a_run_without_a_profile_has_no_table(tmp_path: Path) -> None:
    assert table.read(tmp_path) is None
