"""The observer of every rank on real groups: what it writes when nothing moves, and that it takes it back."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain.failures import lost_a_peer, unwrapped
from disttrain.hang import files
from disttrain.hang.observer import ledger, observing
from disttrain.launch import detect
from disttrain.mesh import Mesh
from disttrain.parallel import world
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from tests.parallel.test_data_parallel import make_engine
from tests.parallel.test_layouts import config_of, micro_batches
from tests.ranks import RanksFailed, run_ranks


def until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _observed(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    reached = [7]
    with observing(folder, detect(os.environ), 1.0) as observer:
        observer.step = lambda: reached[0]
        until(lambda: len(files.read(folder)) == 2)
        found = files.read(folder)[1 - rank]
        assert (found.step, found.error) == (7, None)
        assert any(frame.function == "until" and frame.file.endswith("test_hang.py") for frame in found.stack)
        dist.barrier()
        reached[0] = 8
        until(lambda: not (folder / files.FOLDER).exists())


def test_a_rank_that_does_not_move_says_so_until_it_does(tmp_path: Path) -> None:
    run_ranks(_observed, 2, tmp_path)


def _groups(rank: int) -> None:
    groups = make_groups(Mesh(replicate=2, tensor=2), rank, "cpu", Traffic())
    made = {group.process_group for group in (groups.tensor, groups.data)}
    assert {group.group_desc for group in made if group} == {"tensor", "data"}
    for group in made:
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout == world.timeout()


def test_groups_have_names_and_wait_as_long_as_the_world() -> None:
    run_ranks(_groups, 4)


def _lost(rank: int, folder: Path) -> None:
    groups = make_groups(Mesh(tensor=2), rank, "cpu", Traffic())
    dist.all_reduce(torch.ones(3, 2), group=groups.tensor.process_group)
    calls = ledger()
    assert [(c.operation, c.ranks, c.completed) for c in calls] == [("all_reduce", (0, 1), True)]
    assert calls[0].shapes == ((3, 2),)
    assert not lost_a_peer(ValueError("Connection closed by peer"))


def test_the_ledger_is_torchs_flight_recorder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", world.LEDGER_CALLS)
    run_ranks(_lost, 2, tmp_path)


def _left_alone(rank: int, folder: Path) -> None:
    world, config = config_of("tensor x pipeline x zero 1", "gpt")
    engine = make_engine(config, rank, world)
    if rank == 0:
        raise ZeroDivisionError
    try:
        for step in range(1, 100):
            engine.step(micro_batches(engine, step), step, 1e-3)
    except Exception as error:
        (folder / str(rank)).write_text(f"{lost_a_peer(error)}: {unwrapped(error)}")
        raise


def test_a_lost_peer_is_known_inside_a_stage_too(tmp_path: Path) -> None:
    """torch's pipelines raise another error from the one that a collective of the model raised."""
    with pytest.raises(RanksFailed):
        run_ranks(_left_alone, 8, tmp_path)
    said = [path.read_text() for path in tmp_path.iterdir()]
    assert said and [text for text in said if not text.startswith("True: ") or "failed to run" in text] == []
