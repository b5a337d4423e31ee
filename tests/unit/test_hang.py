"""Why a run hangs, from files made by hand: every cause, and who is to blame where many wait."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from disttrain.hang import files
from disttrain.hang.explanation import explain
from disttrain.hang.files import Call, Frame, RankState
from disttrain.hang.reading import evidence_of

GROUPS = {"tensor": ((0, 1), (2, 3)), "data": ((0, 2), (1, 3)), "world": ((0, 1, 2, 3),), "checkpoint": ((0, 1, 2, 3),)}
REDUCE = Frame("disttrain/parallel/tensor.py", 179, "forward", "return conjugate.reduce_from(rows, self.group)")
WAITING = (Frame("torch/distributed/distributed_c10d.py", 3245, "all_reduce", "work.wait()"),
           Frame("disttrain/parallel/collectives.py", 68, "reduce_over", "dist.all_reduce(tensor)"), REDUCE)  # fmt: skip
NEIGHBOUR = (Frame("torch/distributed/pipelining/schedules.py", 660, "_wait_batch_p2p", "work.wait()"),
             Frame("disttrain/parallel/pipeline.py", 90, "run", "self.schedule.step()"))  # fmt: skip


def call(rank: int, axis: str, sequence: int, done: bool = False, operation: str = "all_reduce", shape=(8, 4)) -> Call:
    ranks = next(ranks for ranks in GROUPS[axis] if rank in ranks)
    desc = "default_pg" if axis == "world" else axis
    return Call(f"gloo {axis} {ranks}", desc, ranks, sequence, operation, (shape,), "Float", done, 1e9 + sequence)


def state(rank: int, *calls: Call, stack=WAITING, error: str | None = None, of_peers: bool = False) -> RankState:
    return RankState(rank, 4, f"host{rank // 2}", 100 + rank, 12, 2e9 + rank, 6.0, tuple(stack), calls, error, of_peers)


def said(tmp_path: Path, *states: RankState) -> str:
    """The paragraph, by way of the files."""
    for one in states:
        files.write(tmp_path, one)
        assert files.read(tmp_path)[one.rank] == one
    return explain(evidence_of(tmp_path))


def test_a_rank_that_left_nothing_is_named_with_its_host_and_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0003.log").write_text("12:00 INFO root: started on host1: train\n12:01 link down\n")
    text = said(tmp_path, state(0, call(0, "world", 7)), state(1, call(1, "world", 7)),
                state(2, call(2, "world", 6, done=True), call(2, "tensor", 5)))  # fmt: skip
    assert text.startswith("Rank 3 (host host1) did not arrive. Rank 2 has waited for rank 3 since ")
    assert (
        "in all_reduce number 5 of group tensor (ranks 2, 3), float [8, 4], at disttrain/parallel/tensor.py:179" in text
    )
    assert "after step 12. Ranks 0, 1 have to wait in turn. Likely cause: rank 3 left no word" in text
    assert "is stopped, its host is down or cut off" in text
    assert text.endswith("is: 12:01 link down. The same command goes on from the newest checkpoint.")


def test_what_the_step_waits_in_comes_before_the_checkpoint_beside_it(tmp_path: Path) -> None:
    text = said(tmp_path, *(state(rank, call(rank, "checkpoint", 3), call(rank, "world", 7)) for rank in range(3)))
    assert "in all_reduce number 7 of group world" in text
    assert "checkpoint (" not in text


def test_a_closed_connection_means_that_the_process_is_gone(tmp_path: Path) -> None:
    lost = [state(rank, call(rank, "world", 7), error="RuntimeError: Connection closed by peer", of_peers=True)
            for rank in range(3)]  # fmt: skip
    assert "rank 3 left no word when the others did: its process has ended (killed" in said(tmp_path, *lost)


@pytest.mark.parametrize(("frames", "words"), [
    ([Frame("python/gzip.py", 1, "read"), Frame("disttrain/data/shards.py", 40, "rows", "x")],
     "reading its data, at disttrain/data/shards.py:40 (x)"),
    ([Frame("disttrain/checkpoint.py", 60, "save")], "saving or loading a checkpoint, at disttrain/checkpoint.py:60"),
    ([Frame("torch/_inductor/codecache.py", 9, "load"), REDUCE], f"compiling, at {REDUCE.file}:179 ({REDUCE.text})"),
    ([Frame("/home/me/mine.py", 11, "forward", "slow()"), Frame("disttrain/recorder.py", 70, "evaluate")],
     "in forward of an evaluation, at /home/me/mine.py:11 (slow())"),
])  # fmt: skip
def test_a_rank_that_waits_for_nobody_says_what_it_does(tmp_path: Path, frames: list[Frame], words: str) -> None:
    """Rank 3 waits for rank 1 in another group than ranks 0 and 2 do, which is no reason to blame it."""
    text = said(tmp_path, state(0, call(0, "world", 7)), state(2, call(2, "world", 7)), state(3, call(3, "data", 4)),
                state(1, call(1, "world", 6, done=True), call(1, "data", 3, done=True), stack=frames))  # fmt: skip
    assert text.startswith("Rank 1 (host host0, process 101) did not arrive. Rank 3 has waited for rank 1")
    assert f"Likely cause: rank 1 is {words}, after step 12; " in text


def test_neighbours_in_a_pipeline_leave_only_stacks(tmp_path: Path) -> None:
    text = said(tmp_path, *(state(rank, stack=NEIGHBOUR) for rank in (0, 1, 3)),
                state(2, stack=[Frame("disttrain/data/shards.py", 40, "rows")]))  # fmt: skip
    assert text.startswith(
        "Rank 2 (host host1, process 102) did not arrive. Rank 0 waits at disttrain/parallel/pipeline.py:90"
    )
    assert "reading its data" in text


def test_different_collectives_are_different_branches(tmp_path: Path) -> None:
    text = said(tmp_path, *(state(rank, call(rank, "world", 7)) for rank in (0, 2, 3)),
                state(1, call(1, "world", 7, operation="broadcast")))  # fmt: skip
    assert "ranks 0, 2, 3 are in all_reduce number 7 of group world (ranks 0 to 3)" in text
    assert "; rank 1 is in broadcast number 7 of group world" in text
    assert text.endswith("the code took different branches on different ranks.")


def test_different_shapes_count_only_where_they_must_agree(tmp_path: Path) -> None:
    uneven = [state(rank, call(rank, "world", 6, True, "all_to_all", (rank + 1,)),
                    call(rank, "world", 7, shape=(8, 4 + rank // 3))) for rank in range(4)]  # fmt: skip
    text = said(tmp_path, *uneven)
    assert "ranks 0 to 2 are in all_reduce number 7" in text
    assert "rank 3 is in all_reduce number 7 of group world (ranks 0 to 3), float [8, 5]" in text
    assert "hand over other shapes" in text


def test_ranks_that_wait_for_each_other(tmp_path: Path) -> None:
    text = said(tmp_path, state(0, call(0, "data", 3)), state(2, call(2, "tensor", 5)),
                state(3, call(3, "data", 3)), state(1, call(1, "tensor", 5)))  # fmt: skip
    assert "Ranks 0 to 3 wait for each other: rank 0 waits for rank 2 in all_reduce number 3 of group data" in text
    assert "different branches" in text


def test_when_all_arrived_the_network_is_to_blame(tmp_path: Path) -> None:
    text = said(tmp_path, *(state(rank, call(rank, "world", 7)) for rank in range(4)))
    assert text.startswith(
        "All ranks arrived and nothing completes: rank 0 waits in all_reduce number 7 of group world"
    )
    assert "network" in text


def test_a_failure_of_its_own_comes_before_everything_else(tmp_path: Path) -> None:
    failed = state(1, call(1, "world", 6, done=True), stack=[Frame("/home/me/mine.py", 3, "loss", "raise")],
                   error="ValueError: a bad sample")  # fmt: skip
    lost = [state(rank, call(rank, "world", 7), error="RuntimeError: closed by peer", of_peers=True) for rank in (0, 2)]
    text = said(tmp_path, failed, *lost)
    assert text.startswith(
        "Rank 1 (host host0, process 101) failed at /home/me/mine.py:3 (raise), after step 12: ValueError: a"
    )
    assert "Ranks 0, 2 have waited for ranks 1, 3 since" in text


def test_the_only_axis_gives_the_group_of_all_ranks_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("parallel: {context: 4}\n")
    assert "number 7 of group context" in said(tmp_path, *(state(rank, call(rank, "world", 7)) for rank in range(3)))


def test_the_command_shows_every_rank_and_refuses_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="nothing to explain"):
        CliRunner().invoke(app, ["explain", str(tmp_path)], catch_exceptions=False, standalone_mode=False)
    text = said(tmp_path, *(state(rank, call(rank, "world", 7)) for rank in range(3)))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["explain", str(tmp_path)])
    assert shown.exit_code == 0
    assert text.split() == shown.stdout.split("┏")[0].split()
    assert "no word from it" in shown.stdout
