"""Checkpoints: exact round trip, damage found and named, nothing half-written is ever taken, failures on all ranks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from disttrain import checkpoint
from disttrain.checkpoint import CheckpointFailed
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from tests.parallel.test_data_parallel import BATCH, config_for, global_batch, make_engine
from tests.ranks import gathered, run_ranks


def advance(engine: NativeEngine, rank: int, world: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        share = BATCH // world
        whole = global_batch("gpt", step) | {"samples": np.arange(BATCH) + step * BATCH}
        batch = {k: v[rank * share : (rank + 1) * share] for k, v in whole.items()}
        loss = engine.step([batch], step, 1e-2).losses["lm"]
        losses.append(float(loss.sum / loss.count))
    return losses


def save_and_go_on(rank: int, config: Config, world: int, folder: Path) -> dict:
    engine = make_engine(config, rank, world)
    advance(engine, rank, world, range(1, 4))
    state = engine.state_dict()
    checkpoint.save(folder, 3, state, {"step": 3, "engine": state.pop("engine")}, keep=2)
    losses = advance(engine, rank, world, range(4, 7))
    return {"losses": losses, "weights": gathered(engine, "weight")}


def load_and_go_on(rank: int, config: Config, world: int, path: Path) -> dict:
    engine = make_engine(with_values(config, {"run.seed": 999}), rank, world)  # other weights: all must be loaded
    engine.config = config
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    losses = advance(engine, rank, world, range(trainer["step"] + 1, 7))
    return {"losses": losses, "weights": gathered(engine, "weight")}


@pytest.mark.parametrize(("precision", "world"), [("fp64", 1), ("fp32", 2), ("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_resume_is_bit_exact(tmp_path: Path, precision: str, world: int) -> None:
    config = config_for("gpt", **{"precision": precision, "model.dropout": 0.1})
    undisturbed = run_ranks(save_and_go_on, world, config, world, tmp_path)
    path, damaged = checkpoint.newest_good(tmp_path)
    assert path is not None
    assert damaged == []
    for expected, got in zip(undisturbed, run_ranks(load_and_go_on, world, config, world, path), strict=True):
        assert got["losses"] == expected["losses"]
        assert all(torch.equal(got["weights"][n], w) for n, w in expected["weights"].items())


def test_another_world_size_can_load(tmp_path: Path) -> None:
    config = config_for("gpt")
    expected = run_ranks(save_and_go_on, 2, config, 2, tmp_path)[0]
    for world in (1, 4):
        for got in run_ranks(load_and_go_on, world, config, world, tmp_path / "step_00000003"):
            assert got["losses"] == pytest.approx(expected["losses"], rel=1e-10)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1, 2 and 3."""
    run_ranks(save_three, 1, config_for("gpt"), tmp_path)
    return tmp_path


def save_three(rank: int, config: Config, folder: Path) -> None:
    engine = make_engine(config, rank, 1)
    for step in (1, 2, 3):
        advance(engine, 0, 1, range(step, step + 1))
        state = engine.state_dict()
        checkpoint.save(folder, step, state, {"step": step, "engine": state.pop("engine")}, keep=3)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def rewrite_format(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGES = {
    "bit flip": (lambda p: flip_a_bit(p / SHARD), "another checksum"),
    "truncated": (lambda p: os.truncate(p / SHARD, 100), "has 100 bytes"),
    "missing shard": (lambda p: (p / SHARD).unlink(), f"{SHARD} is missing"),
    "old format": (lambda p: rewrite_format(p / "manifest.json"), "it has format 1"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "broken manifest": (lambda p: (p / "manifest.json").write_text("{"), "unreadable"),
    "missing trainer": (lambda p: (p / "trainer.json").unlink(), "trainer.json is missing"),
    "changed trainer": (lambda p: (p / "trainer.json").write_text('{"step": 9}'), "trainer.json has"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_an_older_one_taken(saved: Path, kind: str) -> None:
    harm, message = DAMAGES[kind]
    harm(saved / "step_00000003")
    path, damaged = checkpoint.newest_good(saved)
    assert path == saved / "step_00000002"
    assert len(damaged) == 1
    assert damaged[0].startswith("step_00000003: ")
    assert message in damaged[0]


def test_half_written_and_half_removed_are_never_taken(saved: Path) -> None:
    (saved / "step_00000003").rename(saved / "step_00000003.writing")
    (saved / "step_00000002").rename(saved / "step_00000002.deleting")
    assert checkpoint.newest_good(saved) == (saved / "step_00000001", [])
    checkpoint.clean(saved)
    assert [p.name for p in saved.iterdir()] == ["step_00000001"]


def test_only_the_newest_are_kept(saved: Path) -> None:
    checkpoint.prune(saved, 3, 2)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(saved)] == [2, 3]


def test_damaged_ones_of_later_steps_do_not_push_out_good_ones(saved: Path) -> None:
    """A run whose newest checkpoints are all damaged goes on from before them, and keeps what it saves on the way back."""
    for step in (2, 3):
        (saved / f"step_{step:08d}" / checkpoint.MANIFEST).unlink()
    checkpoint.prune(saved, 1, keep=1)
    assert checkpoint.newest_good(saved)[0] == saved / "step_00000001"


@pytest.mark.parametrize(("keep", "every", "best", "left"), [
    (1, 0, 0, [9]), (1, 4, 0, [4, 8, 9]), (2, 0, 2, [3, 6, 8, 9]), (1, 3, 1, [3, 6, 9]), (9, 0, 0, [*range(1, 10)]),
])  # fmt: skip
def test_those_of_some_steps_and_the_best_are_kept_too(
    tmp_path: Path, keep: int, every: int, best: int, left: list[int]
) -> None:
    losses = {1: 5.0, 2: 4.0, 3: 3.0, 4: None, 5: 3.5, 6: 2.0, 7: float("nan"), 8: 4.0, 9: 3.2}
    for step, loss in losses.items():
        (folder := tmp_path / f"step_{step:08d}").mkdir()
        (folder / checkpoint.TRAINER).write_text(json.dumps({"step": step, "eval_loss": loss}))
    checkpoint.prune(tmp_path, 9, keep, every, best)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == left


def failing_save(rank: int, config: Config, folder: Path) -> str:
    engine = make_engine(config, rank, 2)
    advance(engine, rank, 2, range(1, 2))
    state = engine.state_dict()
    trainer = {"step": 4, "engine": state.pop("engine")}
    if rank == 1:  # this rank's disk refuses
        checkpoint.checksums_of = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        checkpoint.save(folder, 4, state, trainer, keep=1)
    except CheckpointFailed as failed:
        return str(failed)
    return "saved"


def test_a_failing_disk_fails_every_rank_and_loses_nothing(saved: Path) -> None:
    messages = run_ranks(failing_save, 2, config_for("gpt"), saved)
    assert len(set(messages)) == 1
    assert "step 4 could not be written" in messages[0]
    assert "No space left" in messages[0]
    assert sorted(p.name for p in saved.iterdir()) == [f"step_0000000{i}" for i in (1, 2, 3)]
    assert checkpoint.newest_good(saved) == (saved / "step_00000003", [])


def test_trainer_part_is_plain_json(saved: Path) -> None:
    trainer = json.loads((saved / "step_00000002" / "trainer.json").read_text())
    assert trainer == {
        "step": 2,
        "engine": {"loss_scale": {"value": 1.0, "growth_interval": 0, "minimum": 1.0, "good_steps": 0}},
    }


def test_tied_weights_are_stored_once(saved: Path) -> None:
    names = checkpoint.read(saved / "step_00000001")
    assert "model.embed.tokens.weight" in names
    assert not [name for name in names if "head.decoder" in name]


def misfit(rank: int, path: Path) -> str:
    engine = make_engine(config_for("gpt", **{"model.hidden_size": 64, "model.ffn_hidden_size": 128}), rank, 1)
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    try:
        checkpoint.load(path, state)
    except CheckpointFailed as failed:
        return str(failed)
    return "loaded"


def test_another_model_is_refused(saved: Path) -> None:
    (message,) = run_ranks(misfit, 1, saved / "step_00000001")
    assert "could not be loaded" in message
    assert "size" in message.lower()
