"""Every optimizer equals one process under every layout, and goes on under another one; its state has predicted bytes."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from disttrain import checkpoint, memory
from disttrain.config.load import with_values
from disttrain.config.optimizer import OptimConfig
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from disttrain.mesh import build_mesh
from disttrain.verify.layouts import parse
from tests.chosen import ALL, chosen
from tests.parallel.test_data_parallel import BATCH, SEQUENCE, config_for, make_engine
from tests.parallel.test_layouts import micro_batches
from tests.ranks import disagreeing, gathered, run_ranks
from tests.verify.small import proof_for

OPTIMIZERS = {
    "adafactor": OptimConfig(name="adafactor"),
    "muon": OptimConfig(name="muon"),
    "sgd": OptimConfig(name="sgd", nesterov=True),
    "sgd without momentum": OptimConfig(name="sgd", momentum=0.0),
    "adagrad": OptimConfig(name="adagrad"),
    "rmsprop": OptimConfig(name="rmsprop", momentum=0.5, centered=True),
    "adam": OptimConfig(name="adam"),
    "radam": OptimConfig(name="radam"),
}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "zero 2": (2, {"parallel.zero": 2, "train.micro_batch_size": 2}),
    "tensor": (2, {"parallel.tensor": 2}),
    "zero 3": (2, {"parallel.zero": 3}),
    "pipeline": (2, {"parallel.pipeline": 2, "train.micro_batch_size": 2}),
    "data": (2, {}),
    "tensor x sequence x zero 3": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.zero": 3}),
    "hsdp": (4, {"parallel.zero": 2, "parallel.replicate": 2}),
}
ALL_IN = ("zero 2",)
"""Layouts in which all optimizers are compared, whatever else is left out."""
RATE, STEPS = 1e-2, range(1, 3)


def config_of(layout: dict) -> Config:
    """Two layers; a vocabulary of 61, so that shards of embedding and head are uneven."""
    return config_for("gpt", **{"data.sequence_length": SEQUENCE, "train.global_batch_size": BATCH, **layout})


def advance(engine: NativeEngine, steps: range) -> list[float]:
    results = [engine.step(micro_batches(engine, step), step, RATE) for step in steps]
    return [float(r.losses["lm"].sum / r.losses["lm"].count) for r in results]


def train(rank: int, config: Config, world: int, names: list[str]) -> dict[str, tuple]:
    """Losses, copies that differ, whole weights, and bytes of state of each optimizer."""
    found = {}
    for name in names:
        engine = make_engine(with_values(config, {"optim": OPTIMIZERS[name]}), rank, world)
        losses = advance(engine, STEPS)
        state = sum(v.nbytes for one in engine.optimizer.state.values() for v in one.values() if v.ndim)
        found[name] = losses, disagreeing(engine, "weight"), gathered(engine, "weight"), state
        engine.close()
    return found


@functools.cache
def alone() -> dict[str, tuple]:
    return run_ranks(train, 1, config_of({}), 1, list(OPTIMIZERS))[0]


def same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for parameter, weight in expected.items():
        torch.testing.assert_close(found[parameter], weight, rtol=1e-10, atol=1e-10, msg=f"{what}: {parameter}")


@pytest.mark.parametrize("layout", [*list(LAYOUTS)[:4], *(list(LAYOUTS)[4:] if ALL else [])])
def test_every_layout_equals_one_process(layout: str) -> None:
    world, values = LAYOUTS[layout]
    names = list(OPTIMIZERS) if layout in ALL_IN else list(OPTIMIZERS)[:2] + chosen(list(OPTIMIZERS)[2:], 9)
    config = config_of(values)
    ranks = run_ranks(train, world, config, world, names)
    for name in names:
        losses, apart, weights, _ = ranks[0][name]
        assert losses == pytest.approx(alone()[name][0], rel=1e-10), name
        assert apart == [], name
        same(weights, alone()[name][2], name)
    mesh = build_mesh(config.parallel, world)
    for name in names:
        predicted = memory.predict(
            with_values(config, {"optim": OPTIMIZERS[name]}), mesh, "fp64", BATCH // mesh.data_ranks
        )
        for rank, found in enumerate(ranks):
            stage = predicted[mesh.coordinates(rank)["pipeline"]].state.optimizer
            assert found[name][3] <= stage, name
            assert found[name][3] >= 0.95 * stage or rank, name  # rank 0 has the longest shards


def save(rank: int, config: Config, world: int, folder: Path, names: list[str]) -> dict[str, tuple]:
    found = {}
    for name in names:
        engine = make_engine(with_values(config, {"optim": OPTIMIZERS[name]}), rank, world)
        advance(engine, range(1, 3))
        state = engine.state_dict()
        checkpoint.save(folder / name, 2, state, {"step": 2, "engine": state.pop("engine")}, keep=2)
        found[name] = advance(engine, range(3, 5)), gathered(engine, "weight")
        engine.close()
    return found


def resume(rank: int, config: Config, world: int, folder: Path, names: list[str]) -> dict[str, tuple]:
    """From other weights: all must be loaded."""
    found = {}
    for name in names:
        engine = make_engine(with_values(config, {"optim": OPTIMIZERS[name], "run.seed": 999}), rank, world)
        path = folder / name / "step_00000002"
        state = engine.to_fill(lambda path=path: checkpoint.shapes(path))
        trainer = checkpoint.load(path, state)
        engine.load_state_dict({**state, "engine": trainer["engine"]})
        found[name] = advance(engine, range(3, 5)), gathered(engine, "weight")
        engine.close()
    return found


def test_a_checkpoint_moves_between_layouts(tmp_path: Path) -> None:
    """Factors, momentum, and nothing at all are taken over from shards of shards by one process, stages and shards."""
    names = ["adafactor", "muon", "sgd without momentum", *(["rmsprop"] if ALL else [])]
    world, values = LAYOUTS["tensor x sequence x zero 3" if ALL else "tensor"]
    saved = run_ranks(save, world, config_of(values), world, tmp_path, names)[0]
    for layout in ("zero 3", *(("pipeline", "one process") if ALL else ())):
        world, values = LAYOUTS.get(layout, (1, {}))
        found = run_ranks(resume, world, config_of(values), world, tmp_path, names)[0]
        for name in names:
            assert found[name][0] == pytest.approx(saved[name][0], rel=1e-10), (layout, name)
            same(found[name][1], saved[name][1], f"{layout}, {name}")


@pytest.mark.slow
def test_workers_keep_factors_of_their_own(tmp_path: Path) -> None:
    """Local steps: each worker's factors are its own, whole, where weights are cut."""
    config = config_of({"parallel.tensor": 2, "outer.method": "average", "outer.every": 2, "optim.weight_decay": 0.0})
    saved = run_ranks(save, 4, config, 4, tmp_path, ["adafactor"])[0]["adafactor"]
    found = run_ranks(resume, 4, config, 4, tmp_path, ["adafactor"])[0]["adafactor"]
    assert found[0] == pytest.approx(saved[0], rel=1e-12)
    same(found[1], saved[1], "workers")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), chosen([("adafactor", "fp64"), ("muon", "fp32")], 2))
def test_verify_holds_it_to_one_process(name: str, precision) -> None:
    with proof_for("gpt", precision, **{"optim.name": name}) as proof:
        verdict = proof.verify(parse("tp2.dp2.zero3 on 4"))
        assert verdict.equal, verdict.failures[:3]
