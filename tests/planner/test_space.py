"""Which layouts are legal, which fit, which is the fastest: against `disttrain.layout`, `disttrain.memory`, brute force."""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest

from disttrain import memory
from disttrain.config.schema import Config, ParallelConfig
from disttrain.mesh import build_mesh
from disttrain.planner import space
from disttrain.planner.config import enough_ranks
from disttrain.planner.devices import speeds_of
from disttrain.planner.prediction import Predictor
from disttrain.planner.search import search
from disttrain.stages import SCHEDULES
from disttrain.verify.layouts import Layout, parse
from tests.planner.machines import GPU, config, cpu


def every(world: int, batch: int) -> Iterator[Layout]:
    """Every combination of settings, legal or not, as far as the planner looks: no offload, no ZeRO over one rank, stages a
    rank only where the schedule leaves a choice."""
    choices = {name: get_args(ParallelConfig.model_fields[name].annotation) for name in ("schedule", "context_method")}
    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    for axes in space.all_axes(world):
        data = axes.data(world)
        schedules = [("1f1b", None)]
        if axes.pipeline > 1:
            schedules = [(name, v) for name in choices["schedule"]
                         for v in ((None,) if SCHEDULES[name].virtual_stages else (2, 3, 4))]  # fmt: skip
        settings = product(
            (False, True) if axes.tensor > 1 else (False,), schedules,
            choices["context_method"] if axes.context > 1 else ("ring",),
            (0, 1, 2, 3) if data * axes.context > 1 else (0,), space.divisors(data), sizes, space.RECOMPUTE,
        )  # fmt: skip
        for sequence, (schedule, virtual), method, zero, replicas, size, recompute in settings:
            if (zero == 0 and replicas > 1) or (zero and data * axes.context == replicas):
                continue
            yield Layout(world, axes.tensor, sequence, axes.pipeline, schedule, virtual, axes.context, method, zero,
                         replicas, False, recompute, size)  # fmt: skip


@pytest.mark.parametrize("values", [
    {}, {"family": "bert"}, {"model": {"layers": 3, "heads": 2}}, {"data": {"sequence_length": 12}},
    {"compression": {"codec": "powersgd"}},
    {"compression": {"codec": "onebit_adam", "warmup_steps": 2}},
])  # fmt: skip
def test_the_space_is_what_check_accepts(values: dict[str, Any]) -> None:
    """In both directions: nothing legal is left out, and nothing illegal is in it."""
    settings = config(**{**values, "train": {"global_batch_size": 4}})
    ours = set(space.layouts(settings, 4))
    legal = {layout for layout in every(4, 4) if not layout.problems(settings)}
    even = {layout for layout in legal if _stages_are_even(layout, settings)}
    assert ours == even
    assert len(ours) > 20


def _stages_are_even(layout: Layout, settings: Config) -> bool:
    """The planner looks at a schedule's usual two stages a rank, and at numbers that share the layers evenly."""
    virtual = layout.virtual_stages
    return virtual in (None, 2) or settings.model.layers % (layout.pipeline * virtual) == 0


def test_compiling_leaves_out_what_cannot_be_compiled() -> None:
    settings = config(train={"global_batch_size": 4}, run={"compile": True})
    ours = set(space.layouts(settings, 2))
    assert all(layout.compile and not layout.problems(settings) for layout in ours)
    assert not {layout.schedule for layout in ours} & {name for name, s in SCHEDULES.items() if s.splits_backward}


@pytest.mark.parametrize("values", [{}, {"family": "bert"}, {"precision": "fp32"},
                                    {"compression": {"codec": "powersgd"}},
                                    {"optim": {"name": "adafactor"}}, {"optim": {"name": "muon"}},
                                    {"compression": {"codec": "onebit_lamb", "warmup_steps": 2},
                                     "optim": {"name": "lamb"}}])  # fmt: skip
def test_bytes_are_those_of_check(values: dict[str, Any]) -> None:
    """On every rank that differs; the runtime is what `disttrain.memory` leaves out."""
    settings = config(**{**values, "model": {"layers": 6}})
    precision = settings.precision if settings.precision != "auto" else "bf16"
    predictor, compared = Predictor(settings, 8, GPU._replace(precision=precision)), 0
    for layout in list(space.layouts(settings, 8))[::53]:
        applied = layout.applied(settings)
        count = 16 // layout.data // (layout.micro_batch or 1)
        expected = memory.predict(applied, build_mesh(applied.parallel, 8), precision, count)  # pyright: ignore
        found = {rank.stage: rank for rank in predictor.footprint.ranks(layout)}
        worst = max(expected, key=lambda rank: rank.total)
        assert max(rank.total for rank in found.values()) == pytest.approx(worst.total, abs=2), layout.name
        for rank in found.values():
            same = expected[rank.stage]
            assert (rank.weights, rank.copies, rank.gradients, rank.optimizer) == pytest.approx(same.state, abs=1)
            assert (rank.activations, rank.buffers) == pytest.approx((same.activations, same.buffers))
            assert (rank.feedback, rank.runtime) == (same.feedback, 0)
        compared += 1
    assert compared >= 20


def test_what_the_runtime_holds() -> None:
    """NCCL's buffers for the world, and for every axis that is not all of it."""
    predictor = Predictor(config(), 8, GPU._replace(context_bytes=7.0, group_bytes=100.0))
    for name, groups in (("tp2.sp.dp4.zero2.mb2 on 8", 3), ("cp8-ring on 8", 1), ("pp2-1f1b.dp4.mb1 on 8", 4)):
        assert predictor.footprint.worst(parse(name)).runtime == 7.0 + groups * 100.0, name


@pytest.mark.parametrize("speeds", [GPU, GPU._replace(memory_bytes=35e6), cpu(precision="bf16", memory_bytes=40e6)])
def test_a_search_finds_what_trying_all_finds(speeds: Any) -> None:
    settings, world = config(train={"global_batch_size": 8}), 4
    plan = search(settings, world, speeds, speeds.memory_bytes)
    predictor, best, fitting, legal = Predictor(settings, world, speeds), {}, 0, 0
    for layout in space.layouts(settings, world):
        legal += 1
        one = predictor.of(layout)
        if one.memory.total > speeds.memory_bytes:
            continue
        fitting += 1
        axes = layout.tensor, layout.pipeline, layout.context
        best[axes] = min(best.get(axes, one.step_seconds), one.step_seconds)
    assert (plan.legal, plan.fitting) == (legal, fitting)
    found = {(p.layout.tensor, p.layout.pipeline, p.layout.context): p.step_seconds for p in plan.best}
    assert found == pytest.approx(best)
    assert [p.step_seconds for p in plan.best] == sorted(found.values())
    assert plan.timed <= fitting
    assert sum(rejection.count for rejection in plan.too_large) == legal - fitting
    few = search(settings, world, speeds, speeds.memory_bytes, keep=2)
    assert few.best[:2] == plan.best[:2] and few.timed <= plan.timed
    for one in plan.best:
        assert one.memory.total <= speeds.memory_bytes and not one.layout.problems(settings)


def test_rejections_are_counted_and_explained() -> None:
    settings = config(train={"global_batch_size": 8})
    plan = search(settings, 16, GPU, 20e6)
    reasons = {rejection.reason: rejection for rejection in plan.illegal}
    assert "4 heads cannot be split evenly over 8 ranks" in reasons
    assert any("cannot be split evenly over the data ranks" in reason for reason in reasons)
    assert any("layers cannot fill" in reason for reason in reasons)
    nearest = plan.too_large[-1].nearest
    assert "GiB of 0.0" in nearest and "needs" in nearest and " on 16: " in nearest
    assert plan.nearest is not None


def test_a_plan_that_fits_nowhere_says_how_many_ranks_would_do() -> None:
    settings = config(train={"global_batch_size": 64})
    gpu = GPU._replace(memory_bytes=10e6)
    assert search(settings, 2, gpu, 10e6).best == []
    enough = enough_ranks(settings, 2, gpu, 10e6)
    assert enough is not None and enough > 2
    assert search(settings, enough, gpu, 10e6).best
    assert enough_ranks(settings, 2, gpu, 1e3) is None


def preset(name: str, batch: int, **values: Any) -> Config:
    from disttrain.config.presets import PRESETS

    shape = PRESETS[name]
    return Config.model_validate({
        "model": {**shape, "layer_norm_epsilon": 1e-5}, "data": {"corpus": "tokens", "path": "x", "sequence_length": 1024},
        "train": {"steps": 10, "global_batch_size": batch}, "precision": "bf16", **values,
    })  # fmt: skip


def test_a_small_model_is_data_parallel() -> None:
    gpu = speeds_of("h100-sxm", "bf16", 16)
    plan = search(preset("gpt2-124m", 64), 16, gpu, gpu.memory_bytes, keep=3)
    first = plan.best[0].layout
    assert (first.tensor, first.pipeline, first.context) == (1, 1, 1)


def test_a_large_model_shares_its_matrices_inside_hosts_and_its_layers_between_them() -> None:
    """GPT-3 175B on 64 H100s: tensor parallelism with sequence parallelism on no more ranks than a host has, and a
    pipeline, or everything sharded; data-parallel copies cannot fit."""
    gpu = speeds_of("h100-sxm", "bf16", 64)
    plan = search(preset("gpt3-175b", 32), 64, gpu, gpu.memory_bytes, keep=3)
    first = plan.best[0]
    assert 1 < first.layout.tensor <= 8 and first.layout.sequence and first.layout.pipeline > 1
    assert 0.3 < (first.mfu_full or 0) < 0.6
    assert all("ZeRO" in rejection.reason for rejection in plan.too_large)
    assert first.memory.total < gpu.memory_bytes
    assert all(one.layout.data > 1 or one.layout.pipeline > 1 for one in plan.best)
