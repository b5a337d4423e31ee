"""A checkpoint that is written beside training holds its own step, and its failure is everybody's."""

import threading
from pathlib import Path

import pytest
import torch

from disttrain import checkpoint
from disttrain.checkpoint import CheckpointFailed
from disttrain.config.load import with_values
from disttrain.config.schema import CheckpointConfig, Config
from disttrain.saving import Saver
from tests.parallel.test_checkpoint import advance, load_and_go_on
from tests.parallel.test_data_parallel import config_for, make_engine
from tests.ranks import gathered, run_ranks

BESIDE = CheckpointConfig(every=1, keep=2)


def train_beside_a_slow_disk(rank: int, config: Config, world: int, folder: Path) -> dict:
    may_write, write = threading.Event(), checkpoint.save

    def slow(*words, **more) -> Path:
        may_write.wait(60)
        return write(*words, **more)

    checkpoint.save = slow
    engine = make_engine(config, rank, world)
    with Saver(folder, BESIDE, torch.device("cpu")) as saver:
        for step in (2, 3):  # the second copy goes to the memory of the first
            advance(engine, rank, world, range(1, 3) if step == 2 else range(3, 4))
            state = engine.state_dict()
            may_write.clear() if step == 3 else may_write.set()
            saver.save(step, state, {"step": step, "engine": state.pop("engine")}, beside=True)
        losses = advance(engine, rank, world, range(4, 7))
        there = [path.name for path in checkpoint.checkpoints(folder)]
        may_write.set()
        saver.wait()
        saved = [(done.step, done.path.name) for done in saver.take_done()]
    return {"losses": losses, "weights": gathered(engine, "weight"), "there": there, "saved": saved}


@pytest.mark.parametrize("changes", [{}, {"parallel.zero": 3}, {"compression.codec": "int8"}], ids=str)
def test_the_state_is_that_of_its_step(tmp_path: Path, changes: dict) -> None:
    config = with_values(config_for("gpt", precision="fp32"), changes)
    trained = run_ranks(train_beside_a_slow_disk, 2, config, 2, tmp_path)
    assert all(rank["there"] == ["step_00000002"] for rank in trained)  # it trained on before step 3 was there
    assert trained[0]["saved"] == [(2, "step_00000002"), (3, "step_00000003")]
    path = checkpoint.path_of(tmp_path, 3)
    assert checkpoint.damage(path) is None
    for expected, got in zip(trained, run_ranks(load_and_go_on, 2, config, 2, path), strict=True):
        assert got["losses"] == expected["losses"]
        assert all(torch.equal(got["weights"][name], weight) for name, weight in expected["weights"].items())


def fail_on_rank_1(rank: int, config: Config, folder: Path) -> list:
    def fail(folder: Path, prefix: str) -> dict:
        raise OSError(28, "No space left on device")

    if rank == 1:
        checkpoint.checksums_of = fail
    engine = make_engine(config, rank, 2)
    with Saver(folder, BESIDE, torch.device("cpu")) as saver:
        state = engine.state_dict()
        saver.save(1, state, {"step": 1, "engine": state.pop("engine")}, beside=True)
        losses = advance(engine, rank, 2, range(1, 3))  # goes on meanwhile
        while not saver.failed:
            threading.Event().wait(0.01)
        with pytest.raises(CheckpointFailed, match="step 1 could not be written.*No space left on device"):
            saver.wait()
        return [len(losses), saver.failed, saver.take_done()]


def test_a_disk_that_is_full_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    outcomes = run_ranks(fail_on_rank_1, 2, config_for("gpt", precision="fp32"), tmp_path)
    assert outcomes == [[2, False, []]] * 2
    assert list(tmp_path.iterdir()) == []
