"""Layouts on up to 8 ranks through the engine: what `tests/verify` proves in bulk is here one by one, and more."""

from pathlib import Path

import numpy as np
import pytest
import torch

from disttrain import checkpoint
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from disttrain.mesh import build_mesh
from tests.chosen import chosen
from tests.parallel.test_data_parallel import BATCH, SEQUENCE, config_for, global_batch, make_engine
from tests.ranks import gathered, run_ranks

BASE = {"model.layers": 4, "model.dropout": 0.1, "train.label_smoothing": 0.1, "data.sequence_length": SEQUENCE,
        "train.global_batch_size": BATCH}  # fmt: skip

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one process": (1, {}),
    "tensor x pipeline x zero 1": (8, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1}),
    "tensor x sequence x zero 3": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.zero": 3}),
    "context x pipeline x zero 2": (
        8,
        {"parallel.context": 2, "parallel.pipeline": 2, "parallel.zero": 2, "parallel.context_method": "ulysses"},
    ),
    "hsdp": (4, {"parallel.zero": 2, "parallel.replicate": 2}),
    "zbv": (2, {"parallel.pipeline": 2, "parallel.schedule": "zbv"}),
    "offload": (2, {"parallel.zero": 3, "parallel.offload": True, "parallel.recompute": "full"}),
}


def micro_batches(engine: NativeEngine, step: int) -> list[dict[str, np.ndarray]]:
    """What this rank reads of the step's global batch, as `Data.micro_batches` deals it out."""
    config, mesh = engine.config, engine.groups.mesh
    whole = global_batch(config.model.family, step) | {"samples": np.arange(BATCH) + step * BATCH}
    size = config.train.micro_batch_size or BATCH // mesh.data_ranks
    stride, first = size * mesh.data_ranks, mesh.data_rank(engine.groups.rank) * size
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(first, BATCH, stride)]


def advance(engine: NativeEngine, steps: range) -> list[float]:
    """Losses of these steps."""
    losses = []
    for step in steps:
        result = engine.step(micro_batches(engine, step), step, 1e-2)
        losses.append(sum(float(loss.sum / loss.count) for loss in result.losses.values()))
    return losses


def save(rank: int, config: Config, world: int, folder: Path) -> tuple:
    engine = make_engine(config, rank, world)
    advance(engine, range(1, 3))
    state = engine.state_dict()
    checkpoint.save(folder, 2, state, {"step": 2, "engine": state.pop("engine")}, keep=2)
    return advance(engine, range(3, 5)), gathered(engine, "weight")


def resume(rank: int, config: Config, world: int, path: Path) -> tuple:
    engine = make_engine(with_values(config, {"run.seed": 999}), rank, world)  # other weights: all must be loaded
    engine.config = config
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    return advance(engine, range(3, 5)), gathered(engine, "weight")


def config_of(name: str, family: str, **values) -> tuple[int, Config]:
    world, layout = LAYOUTS[name]
    pipelined = {"train.micro_batch_size": 2} if "parallel.pipeline" in layout else {}
    return world, config_for(family, **BASE, **layout, **pipelined, **values)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_checkpoint_moves_between_layouts(tmp_path: Path, family: str) -> None:
    """Saved under a 2 x 2 x 2 layout, loaded under others: weights, moments, step count."""
    world, config = config_of("tensor x pipeline x zero 1", family)
    losses, weights = run_ranks(save, world, config, world, tmp_path)[0]
    for name in chosen(LAYOUTS, 3 if family == "gpt" else 4):
        world, config = config_of(name, family)
        found, loaded = run_ranks(resume, world, config, world, tmp_path / "step_00000002")[0]
        assert found == pytest.approx(losses, rel=1e-10), name
        for parameter, weight in weights.items():
            torch.testing.assert_close(loaded[parameter], weight, rtol=1e-9, atol=1e-10, msg=f"{name}: {parameter}")


@pytest.mark.parametrize("number", chosen(range(1, len(LAYOUTS)), 3))
def test_low_precision_follows_fp64(number: int) -> None:
    """fp16, which has most of its own, under each of them; fp32 and bf16 in turns."""
    for precision in ("fp16", ("fp32", "bf16")[number % 2]):
        follows_fp64(list(LAYOUTS)[number], precision, {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3}[precision])


def follows_fp64(name: str, precision: str, tolerance: float) -> None:
    (reference,) = run_ranks(losses_and_norms, 1, config_of("one process", "gpt")[1], 1)
    world, config = config_of(name, "gpt", precision=precision)
    for found in run_ranks(losses_and_norms, world, config, world):
        assert found == pytest.approx(reference, rel=tolerance)


def losses_and_norms(rank: int, config: Config, world: int) -> list[float]:
    engine = make_engine(config, rank, world)
    results = [engine.step(micro_batches(engine, step), step, 1e-3) for step in range(1, 4)]
    return [float(value) for r in results for value in (r.losses["lm"].sum / r.losses["lm"].count, r.grad_norm)]


def skip(rank: int, config: Config, world: int, culprit: int) -> dict:
    engine = make_engine(config, rank, world)
    before = gathered(engine, "weight")

    def overflow(moment: str) -> None:
        if moment == "reduced" and rank == culprit:
            gradients = (p.gradient for p in engine.parameters)
            next(g for g in gradients if g is not None and g.numel()).fill_(float("inf"))

    engine.watch = overflow
    result = engine.step(micro_batches(engine, 1), 1, 1e-2)
    engine.watch = None
    same = all(torch.equal(weight, before[name]) for name, weight in gathered(engine, "weight").items())
    following = engine.step(micro_batches(engine, 2), 2, 1e-2)
    return {"skipped": result.skipped, "same": same, "scale": engine.scale.value, "then": following.skipped}


@pytest.mark.parametrize("name", chosen(["tensor x pipeline x zero 1", "context x pipeline x zero 2", "hsdp"], 2))
def test_one_overflow_anywhere_makes_every_rank_skip(name: str) -> None:
    world, config = config_of(name, "gpt", precision="fp16")
    for culprit in (0, world - 1):
        for found in run_ranks(skip, world, config, world, culprit):
            assert found == {"skipped": True, "same": True, "scale": 32768.0, "then": False}


def test_every_element_has_the_number_of_copies_that_is_claimed() -> None:
    """The norm counts each element once because of `Shard.copies`: add the shares of all ranks up."""
    for name, (world, _) in chosen(LAYOUTS.items(), 2):
        held = run_ranks(shares, world, config_of(name, "bert")[1], world)
        counted = {}
        for rank in held:
            for parameter, share in rank:
                counted[parameter] = counted.get(parameter, 0) + share
        sizes = dict(run_ranks(shares, 1, config_of("one process", "bert")[1], 1)[0])
        assert counted == pytest.approx(sizes), name


def shares(rank: int, config: Config, world: int) -> list[tuple[str, float]]:
    engine = make_engine(config, rank, world)
    assert build_mesh(config.parallel, world) == engine.groups.mesh
    return [(p.shard.name, p.master.numel() / p.shard.copies) for p in engine.parameters if not p.shard.tied_to]
