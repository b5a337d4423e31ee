"""Coded gradients: nothing is lost but late, the same on every rank, under every layout that has a link to code."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from disttrain import checkpoint, memory
from disttrain.config.load import with_values
from disttrain.config.schema import ONE_BIT, Config, GradientCodec
from disttrain.engines.native import NativeEngine
from disttrain.grad_compression import carriage
from disttrain.mesh import build_mesh
from disttrain.verify.gathering import Gathering
from tests.chosen import ALL, chosen
from tests.parallel.test_data_parallel import config_for, global_batch, make_engine
from tests.ranks import disagreeing, gathered, run_ranks

CODECS = [codec for codec in get_args(GradientCodec) if codec not in ("none", "auto")]
STEPS = 3
LAYOUTS = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp2.mb2": (2, {"train.micro_batch_size": 2}),
    "tp2.dp2": (4, {"parallel.tensor": 2}),
    "tp2.sp.dp2": (4, {"parallel.tensor": 2, "parallel.sequence": True}),
    "cp2.dp2": (4, {"parallel.context": 2}),
    "pp2.dp2": (
        4,
        {
            "parallel.pipeline": 2,
            "data.sequence_length": 16,
            "train.micro_batch_size": 2,
            "compression.embeddings": False,
        },
    ),
    "pp2.dp2.zero2": (
        4,
        {
            "parallel.pipeline": 2,
            "data.sequence_length": 16,
            "train.micro_batch_size": 2,
            "parallel.zero": 2,
            "compression.embeddings": False,
        },
    ),
    "dp2.zero1": (2, {"parallel.zero": 1}),
    "dp2.zero1.mb2": (2, {"parallel.zero": 1, "train.micro_batch_size": 2}),
    "dp2.zero2.mb2": (2, {"parallel.zero": 2, "train.micro_batch_size": 2}),
    "dp3.zero3": (3, {"parallel.zero": 3, "train.global_batch_size": 6}),
    "dp4.zero2.rep2.mb1": (4, {"parallel.zero": 2, "parallel.replicate": 2, "train.micro_batch_size": 1}),
    "tp2.dp2.zero2": (4, {"parallel.tensor": 2, "parallel.zero": 2}),
}
TIED = (4, {**LAYOUTS["pp2.dp2"][1], "compression.embeddings": True})
"""First and last stage hold the same weight and code its gradient, each its part."""


def coded(codec: str, **values) -> Config:
    return config_for("gpt", **{
        "optim.name": ONE_BIT.get(codec, "adamw"),  # pyright: ignore[reportArgumentType, reportCallIssue]
        "compression.codec": codec, "compression.min_elements": 100, "compression.ratio": 0.1,
        "compression.threshold": 1.5, "compression.rank": 2, **values,
    })  # fmt: skip


def summed_gradients(rank: int, config: Config, world: int, rate: float, steps: int = STEPS) -> dict:
    """Sum over the steps of the gradients that were used, and of what is still to come, on rank 0."""
    engine = make_engine(config, rank, world)
    used: dict[str, torch.Tensor] = {}
    apart: list[str] = []

    def keep(moment: str) -> None:
        if moment == "reduced":
            for name, gradient in gathered(engine, "gradient").items():
                used[name] = used.get(name, 0) + gradient
            apart.extend(disagreeing(engine, "gradient"))

    engine.watch = keep
    share = config.train.global_batch_size // engine.groups.mesh.data_ranks
    start = engine.groups.mesh.data_rank(rank) * share
    size = config.train.micro_batch_size or share
    for step in range(1, steps + 1):
        batch = global_batch("gpt", step)
        engine.step(
            [{k: v[i : i + size] for k, v in batch.items()} for i in range(start, start + share, size)], step, rate
        )
    sent, uncompressed, on_wire = engine.traffic()
    apart.extend(disagreeing(engine, "weight"))
    return {
        "used": used,
        "late": residuals(engine),
        "apart": apart,
        "sent": sent,
        "uncompressed": uncompressed,
        "on wire": on_wire,
        "bytes": sum(r.nbytes for r in engine._compressor.residual.values()) if engine._compressor else 0,
        "coded": sorted(engine._compressor.coded) if engine._compressor else [],
        "weights": gathered(engine, "weight"),
    }


def residuals(engine) -> dict[str, torch.Tensor]:
    """What all ranks of the links still hold, whole, on rank 0."""
    compressor = engine._compressor
    if compressor is None:
        return {}
    held = []
    for p in engine.parameters:
        shard = p.shard.in_link(engine.groups)
        residual = compressor.residual.get(p.shard.name, torch.zeros(shard.local_shape, dtype=p.master.dtype)).clone()
        assert residual.shape == shard.local_shape
        dist.all_reduce(residual, group=compressor.link.group.process_group)
        held.append((replace(shard, tied_to=p.shard.tied_to), residual))
    gathering = Gathering(held, engine.groups)
    return gathering.bring(None, {"late": gathering.flat(held)}, {}).whole.get("late", {})


EVERYWHERE = ("topk", "powersgd", "onebit_adam")
"""One codec of each carriage is for every layout, the others for three; the momentum of `ONE_BIT` cannot be sharded."""
CASES = [(codec, layout) for codec in CODECS for layout, (_, values) in LAYOUTS.items()
         if (codec in EVERYWHERE or layout in ("dp2", "dp4", "dp2.zero1"))
         and codec != "int8" and not (codec in ONE_BIT and "parallel.zero" in values)]  # fmt: skip


@functools.cache
def uncoded(batch: int) -> dict:
    """One process without a codec."""
    return run_ranks(summed_gradients, 1, config_for("gpt", **{"train.global_batch_size": batch}), 1, 0.0)[0]


@pytest.mark.parametrize(("codec", "layout"), [*(("int8", layout) for layout in chosen(LAYOUTS, 2)), *chosen(CASES, 5)])
def test_nothing_is_lost_but_late(codec: str, layout: str) -> None:
    world, values = LAYOUTS[layout]
    config = coded(codec, **{"compression.error_feedback": True, **values})
    found = run_ranks(summed_gradients, world, config, world, 0.0)[0]
    plain = uncoded(config.train.global_batch_size)
    assert found["apart"] == []
    assert len(found["coded"]) >= 4
    largest = max(float(g.abs().max()) for g in plain["used"].values())
    for name, gradient in plain["used"].items():
        torch.testing.assert_close(found["used"][name] + found["late"][name], gradient, rtol=0, atol=1e-10 * largest)
    assert any(float(found["late"][name].abs().max()) > 0 for name in found["coded"])
    assert found["sent"] < found["uncompressed"]
    predicted = memory.predict(config, build_mesh(config.parallel, world), "fp64", 2)[0].feedback
    assert found["bytes"] == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("layout", ["dp2", "dp2.zero2.mb2", *(["dp4.zero2.rep2.mb1"] if ALL else [])])
def test_whole_gradients_come_first_where_that_is_asked(layout: str) -> None:
    world, values = LAYOUTS[layout]
    found = [run_ranks(summed_gradients, world, coded("topk", **values, **more), world, 0.0)[0]
             for more in ({}, {"compression.warmup_steps": 2}, {"compression.warmup_steps": 3})]  # fmt: skip
    sent = [each["sent"] for each in found]
    assert sent[0] < sent[1] < sent[2] == found[2]["uncompressed"]
    assert all(not residual.any() for residual in found[2]["late"].values())
    assert any(residual.any() for residual in found[1]["late"].values())


def summed_in_pieces(rank: int, config: Config, world: int, rate: float) -> dict:
    carriage.PIECE_BYTES = 300
    return summed_gradients(rank, config, world, rate)


@pytest.mark.parametrize("layout", ["dp4", "dp2.zero1"])
def test_nothing_is_lost_in_pieces(layout: str) -> None:
    world, values = LAYOUTS[layout]
    config = coded("int8", **{"compression.error_feedback": True, **values})
    found = run_ranks(summed_in_pieces, world, config, world, 0.0)[0]
    plain = uncoded(config.train.global_batch_size)
    assert found["apart"] == []
    largest = max(float(g.abs().max()) for g in plain["used"].values())
    for name, gradient in plain["used"].items():
        torch.testing.assert_close(found["used"][name] + found["late"][name], gradient, rtol=0, atol=1e-10 * largest)


def save_and_go_on(rank: int, config: Config, world: int, folder: Path) -> tuple:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, 4))
    state = engine.state_dict()
    checkpoint.save(folder, 3, state, {"step": 3, "engine": state.pop("engine")}, keep=2)
    late = residuals(engine)
    advance(engine, config, rank, range(4, 6))
    return gathered(engine, "weight"), late


def load_and_go_on(rank: int, config: Config, world: int, path: Path) -> tuple:
    engine = make_engine(with_values(config, {"run.seed": 999}), rank, world)
    engine.config = config
    if engine._compressor is not None:
        engine._compressor._seed = config.run.seed
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    late = residuals(engine)
    advance(engine, config, rank, range(4, 6))
    return gathered(engine, "weight"), late


def advance(engine: NativeEngine, config: Config, rank: int, steps: range, rate: float = 1e-2) -> None:
    mesh = engine.groups.mesh
    share = config.train.global_batch_size // mesh.data_ranks
    start, size = mesh.data_rank(rank) * share, config.train.micro_batch_size or share
    for step in steps:
        batch = global_batch("gpt", step)
        micro_batches = [{k: v[i : i + size] for k, v in batch.items()} for i in range(start, start + share, size)]
        engine.step(micro_batches, step, learning_rate=rate)


@pytest.mark.parametrize(("codec", "layout"), chosen([
    ("topk", "dp4"), ("sign", "dp2.mb2"), ("int4", "dp4"), ("randomk", "dp2"), ("powersgd", "dp4"), ("int8", "dp2"),
    ("sign", "dp4.zero2.rep2.mb1"), ("topk", "dp2.zero2.mb2"), ("powersgd", "dp3.zero3"), ("powersgd", "pp2.dp2"),
    ("sign", "pp2.dp2.tied"),
], 3))  # fmt: skip
def test_resume_is_bit_exact(tmp_path: Path, codec: str, layout: str) -> None:
    world, values = TIED if layout == "pp2.dp2.tied" else LAYOUTS[layout]
    config = coded(codec, **{**values, "precision": "fp32"})
    undisturbed, late = run_ranks(save_and_go_on, world, config, world, tmp_path)[0]
    weights, loaded = run_ranks(load_and_go_on, world, config, world, tmp_path / "step_00000003")[0]
    for name, residual in late.items():
        assert torch.equal(loaded[name], residual)
    for name, weight in undisturbed.items():
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize(("before", "after"), chosen([
    ("dp4", "dp2"), ("dp2", "dp4"), ("dp4", "dp2.zero2.mb2"), ("dp2.zero1", "tp2.dp2"), ("tp2.dp2.zero2", "dp2"),
    ("dp4.zero2.rep2.mb1", "dp4"), ("dp4", "dp4.zero2.rep2.mb1"), ("pp2.dp2.tied", "dp2"), ("dp2", "pp2.dp2.tied"),
], 3))  # fmt: skip
def test_residuals_reach_another_layout(tmp_path: Path, before: str, after: str) -> None:
    layouts = {**LAYOUTS, "pp2.dp2.tied": TIED}
    (world, values), (later_world, later_values) = layouts[before], layouts[after]
    config = coded("topk", **{**values, "compression.error_feedback": True})
    _, late = run_ranks(save_and_go_on, world, config, world, tmp_path)[0]
    config = coded("topk", **{**later_values, "compression.error_feedback": True})
    _, loaded = run_ranks(load_and_go_on, later_world, config, later_world, tmp_path / "step_00000003")[0]
    names = late.keys() if "tied" not in before + after else late.keys() - {"embed.tokens.weight"}
    assert sum(float(late[name].abs().sum()) for name in names) > 0
    for name in names:
        torch.testing.assert_close(loaded[name], late[name], rtol=0, atol=1e-12)


def go_on_without(rank: int, config: Config, world: int, path: Path) -> dict:
    """What a run without a codec takes over, what it saves before it has used it, and what it makes of it."""

    def loaded(path: Path) -> NativeEngine:
        engine = make_engine(config, rank, world)
        state = engine.to_fill(lambda: checkpoint.shapes(path))
        trainer = checkpoint.load(path, state)
        engine.load_state_dict({**state, "engine": trainer["engine"]})
        return engine

    def whole(engine: NativeEngine) -> dict[str, torch.Tensor]:
        held = [(p.shard, engine._late.get(p.shard.name, torch.zeros_like(p.master))) for p in engine.parameters]
        gathering = Gathering(held, engine.groups)
        return gathering.bring(None, {"late": gathering.flat(held)}, {}).whole.get("late", {})

    engine = loaded(path)
    found = {"late": whole(engine)}
    state = engine.state_dict()
    again = checkpoint.save(path.parent, 4, state, {"step": 4, "engine": state.pop("engine")}, keep=2)
    engine = loaded(Path(again))
    found["saved"] = whole(engine)
    gradients: list[dict[str, torch.Tensor]] = []
    for late in (engine._late, {}):
        engine._late = late
        engine.watch = lambda moment: gradients.append(gathered(engine, "gradient")) if moment == "reduced" else None
        advance(engine, config, rank, range(4, 5), rate=0.0)
    found["with"], found["without"] = gradients
    found["left"] = sorted(engine._late)
    return found


@pytest.mark.parametrize(("before", "after"), chosen([
    ("dp2", "one"), ("dp4", "dp2"), ("dp2.zero1", "tp2.dp2"), ("dp2", "dp4"), ("tp2.dp2.zero2", "dp3.zero3"),
    ("dp4", "dp2.zero2.mb2"), ("dp4", "dp4.zero2.rep2.mb1"), ("dp2", "pp2.dp2.tied"), ("pp2.dp2.tied", "dp2"),
], 3))  # fmt: skip
def test_residuals_reach_the_first_step_without_a_codec(tmp_path: Path, before: str, after: str) -> None:
    layouts = {**LAYOUTS, "pp2.dp2.tied": TIED, "one": (1, {})}
    (world, values), (later_world, later_values) = layouts[before], layouts[after]
    config = coded("topk", **{**values, "compression.error_feedback": True})
    _, late = run_ranks(save_and_go_on, world, config, world, tmp_path)[0]
    without = config_for("gpt", **later_values)
    found = run_ranks(go_on_without, later_world, without, later_world, tmp_path / "step_00000003")[0]
    names = late.keys() if "tied" not in before + after else late.keys() - {"embed.tokens.weight"}
    assert sum(float(late[name].abs().sum()) for name in names) > 0
    assert found["left"] == []
    for name in names:
        torch.testing.assert_close(found["late"][name], late[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["saved"][name], late[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["with"][name], found["without"][name] + late[name], rtol=0, atol=1e-12)


def overflowing(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, 3))
    assert engine._compressor is not None
    before = {name: residual.clone() for name, residual in engine._compressor.residual.items()}
    factors = {name: factor.clone() for name, factor in engine._compressor.factor.items()}
    handle = None
    if rank == world - 1:  # one element on one rank
        parameter = next(p for p in engine.parameters if p.shard.name == "blocks.1.mlp.up.weight").parameter

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0] = float("inf")
            return gradient

        handle = parameter.register_hook(spoil)
    share = config.train.global_batch_size // world
    batch = {k: v[rank * share : (rank + 1) * share] for k, v in global_batch("gpt", 3).items()}
    result = engine.step([batch], 3, 1e-2)
    if handle is not None:
        handle.remove()
    kept = all(torch.equal(engine._compressor.residual[name], residual) for name, residual in before.items())
    kept &= all(torch.equal(engine._compressor.factor[name], factor) for name, factor in factors.items())
    again = engine.step([batch], 4, 1e-2)
    return {"skipped": result.skipped, "kept": kept, "fed back": len(before), "again": again.skipped,
            "scale": result.loss_scale / again.loss_scale}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_an_overflow_on_one_rank_is_a_skip_on_all_and_feeds_nothing_back(codec: str) -> None:
    config = coded(codec, **{"precision": "fp16", "loss_scale.initial": 1024.0, "compression.error_feedback": True})
    for found in run_ranks(overflowing, 2, config, 2):
        assert found == {"skipped": True, "kept": True, "fed back": found["fed back"], "again": False, "scale": 2.0}
        assert found["fed back"] >= 6
