"""Seconds of a step: against FLOPs, by hand, and in the direction that physics wants."""

from math import inf
from typing import Any

import pytest

from disttrain import costs
from disttrain.planner.collectives import ring
from disttrain.planner.execution import Execution, ours
from disttrain.planner.kernels import kernels
from disttrain.planner.prediction import Prediction, Predictor, predict
from disttrain.planner.sharing import DDP_BUCKET_BYTES, Groups, Held, messages, replicated, sharded
from disttrain.planner.speeds import Link, Speeds
from disttrain.planner.timeline import Stages, span
from disttrain.stages import theoretical_bubble
from disttrain.verify.layouts import parse
from tests.planner.machines import GPU, config, cpu, even

LAYOUTS = (
    "single on 1", "dp8 on 8", "dp8.zero1.mb1 on 8", "dp8.zero2.full on 8", "dp8.zero3.selective.mb1 on 8",
    "dp16.zero3.rep2.mb1 on 16", "tp4.dp4 on 16", "tp4.sp.dp4.zero1 on 16", "pp4-1f1b.dp4.mb1 on 16",
    "pp2-interleaved_1f1b.dp8.mb1 on 16", "pp2-zbv.dp4.zero2.mb1 on 8", "cp4-ring.dp4 on 16", "cp4-ulysses.dp4 on 16",
    "tp2.sp.pp2-1f1b.cp2-ring.dp2.zero1.mb1 on 16",
)  # fmt: skip


def predicted(name: str, speeds: Speeds = GPU, **values: Any) -> Prediction:
    settings, layout = config(**values), parse(name)
    assert layout.problems(settings) == []
    return predict(settings, layout, speeds)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_one_rank_computes_the_flops_of_the_model(family: str) -> None:
    """At one rate for everything, where nothing else takes time; a fused kernel's backward pass is five products for two."""
    settings, rate = config(family), 1e12
    one = predict(settings, parse("mb4 on 1"), even(rate))
    forward = costs.forward_flops_per_sequence(settings.model, 64, causal=True)
    flops = 16 * (3 * forward.block_linears + 3.5 * forward.attention + 3 * forward.head)
    if family == "bert":  # rounds predicted tokens, and leaves out the pooler
        assert one.parts.compute == pytest.approx(flops / rate, rel=0.01)
    else:
        assert one.parts.compute == pytest.approx(flops / rate)
    assert one.step_seconds == pytest.approx(one.parts.compute)
    assert one.mfu_causal == pytest.approx(16 * 3 * forward.total / one.step_seconds / 1e15)
    assert one.tokens_per_second == pytest.approx(16 * 64 / one.step_seconds)


def test_what_is_recomputed() -> None:
    rate = 1e12
    none, selective, full = (
        predicted(name, even(rate)) for name in ("mb4 on 1", "selective.mb4 on 1", "full.mb4 on 1")
    )
    model = config().model
    again = costs.forward_flops_per_sequence(model, 64, causal=True)
    last = 2 * 64 * 4 * 256 * 1024
    assert selective.step_seconds - none.step_seconds == pytest.approx(16 * again.attention / rate)
    more = again.block_linears + again.attention - last
    assert full.step_seconds - none.step_seconds == pytest.approx(16 * more / rate)
    assert full.hfu is not None and none.hfu is not None and full.mfu_full is not None
    assert full.hfu / full.mfu_full == pytest.approx(
        costs.hardware_flops_per_sequence(model, 64, "full") / costs.training_flops_per_sequence(model, 64, False)
    )


@pytest.mark.parametrize(
    "name", ["tp4 on 4", "tp4.sp on 4", "cp4-ring on 4", "cp4-ulysses on 4", "pp4-gpipe on 4", "dp4 on 4"]
)
def test_axes_share_the_work(name: str) -> None:
    """Four ranks that nothing slows compute a quarter each, as far as the axis divides: the ring's half squares are a few
    scores less than the causal triangle, and a pipeline's last stage has the head."""
    one, four = predicted("single on 1", even(1e12)), predicted(name, even(1e12))
    assert four.parts.compute == pytest.approx(one.parts.compute / 4, rel=0.12)
    assert four.exposed_seconds == 0


def test_ranks_that_share_cores_take_turns() -> None:
    alone, shared = (predicted("dp4 on 4", cpu(at_full_speed=n), precision="fp32") for n in (4, 2))
    assert shared.parts.compute == pytest.approx(2 * alone.parts.compute)
    assert alone.mfu_full is None


EVERYTHING = 10.0
"""How many times slower."""


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("machine", [GPU, cpu()], ids=["gpu", "cpu"])
def test_nothing_slower_makes_a_step_faster(name: str, machine: Speeds) -> None:
    values = {"precision": machine.precision}
    before = predicted(name, machine, **values).step_seconds
    slow = {
        "memory_bytes_per_second": machine.memory_bytes_per_second / EVERYTHING,
        "operator_seconds": machine.operator_seconds * EVERYTHING + 1e-6,
        "collective_share": 0.2,
        "at_full_speed": 1,
    }
    if machine.accelerator:
        slow["ranks_per_host"] = 2  # of CPUs, fewer ranks would share the cores
    for field in ("inside", "between"):
        link = getattr(machine, field)
        slow[f"{field} latency"] = link._replace(latency_seconds=EVERYTHING * link.latency_seconds)
        slow[f"{field} bandwidth"] = link._replace(bytes_per_second=link.bytes_per_second / EVERYTHING)
    if machine.unit is not None:
        slow["unit"] = machine.unit._replace(flops_per_second=machine.unit.flops_per_second / EVERYTHING)
    for field, value in slow.items():
        after = predicted(name, machine._replace(**{field.split()[0]: value}), **values).step_seconds
        assert after >= before * (1 - 1e-12), field


def test_parts_are_of_the_axes_that_there_are() -> None:
    parts = {name: predicted(name).parts for name in LAYOUTS}
    for name, part in parts.items():
        assert (part.tensor > 0) == ("tp" in name)
        assert (part.pipeline > 0) == (part.bubble > 0) == ("pp" in name)
        assert (part.data > 0) == ("dp" in name or "cp" in name), name
        assert min(part) >= 0
    assert parts["cp4-ulysses.dp4 on 16"].context > 0


def test_one_f_one_b_is_the_sum_of_the_stages_and_the_slowest_again_and_again() -> None:
    stages = [1.0, 3.0, 2.0, 1.0]
    found = span("1f1b", 4, 1, 8, Stages(3.0, 3.0, sum(stages), 4), 0.0)
    assert found.total == pytest.approx(sum(stages) + 7 * 3.0)
    assert found.busy == pytest.approx(24.0)


@pytest.mark.parametrize(("schedule", "virtual"), [("gpipe", 1), ("interleaved_1f1b", 3), ("zbv", 2), ("dualpipev", 2)])
def test_equal_stages_leave_the_bubble_of_theory(schedule: str, virtual: int) -> None:
    number = 4 * virtual
    found = span(schedule, 4, virtual, 16, Stages(virtual, 1.0, number, number), 0.0)
    assert found.bubble / found.total == pytest.approx(theoretical_bubble(schedule, 4, virtual, 16))


def test_messages_between_stages_wait_where_few_micro_batches_are_in_flight() -> None:
    """1F1B: a round trip of 4 x 1 s and 6 messages of 0.1 s for every 4 micro-batches; GPipe has all in flight."""
    stages = Stages(1.0, 1.0, 4.0, 4)
    assert span("1f1b", 4, 1, 8, stages, 0.1).waits == pytest.approx(7 * (4.6 / 4 - 1) + 0.6)
    assert span("gpipe", 4, 1, 8, stages, 0.1).waits == pytest.approx(0.6)
    assert span("interleaved_1f1b", 4, 2, 8, Stages(2.0, 1.0, 8.0, 8), 0.1).waits == pytest.approx(0.6)
    assert span("1f1b", 1, 1, 8, Stages(1.0, 1.0, 1.0, 1), 0.0) == (8.0, 0.0, 0.0)


PLAIN = Execution(4, 2, 4, 6, 18, False, False, True, 73)


def sharing(shards: int = 8, replicas: int = 1, held: Held = Held(4, 10**6, 10**5)) -> tuple:
    groups = Groups(ring(GPU, 64, shards, 1), ring(GPU, 64, replicas, shards), ring(GPU, 64, shards * replicas, 1))
    return held, groups, messages(held, groups, PLAIN)


def test_ours_is_autocast() -> None:
    assert ours(config(), "bf16") == PLAIN
    assert ours(config(), "fp32")[:5] == (4, 4, 4, 0, 12)
    assert ours(config(run={"compile": True}), "bf16").fused


def test_ddp_hides_all_but_its_last_bucket() -> None:
    held, groups, _ = sharing(1, 64)
    gpu = kernels(GPU)
    total = 4 * held.elements
    bucket = 2 * (56 * 3e-6 + 7e-5 + 63 / 64 * min(total, DDP_BUCKET_BYTES) / 3e11)
    tree = 2 * (7 * 3e-6 + 3 * 1e-5 + min(total, DDP_BUCKET_BYTES) / (0.9 * 3e11))
    hidden = replicated(held, groups, gpu, PLAIN, pipeline=1, backward=1.0)
    assert hidden.once_waits == pytest.approx(min(bucket, tree))
    bare = replicated(held, groups, gpu, PLAIN, pipeline=1, backward=0.0)
    assert bare.once_waits >= hidden.once_waits
    later = replicated(held, groups, gpu, PLAIN, pipeline=2, backward=1.0)
    assert later.once_waits == 0 and later.after > 0
    assert hidden.forward_pass == pytest.approx(6 * held.elements / 2e12)
    assert hidden.backward_pass == pytest.approx(18 * held.elements / 2e12)


def test_zero_by_hand() -> None:
    """Eight ranks of a host: a block of 1M elements is gathered in bf16 and scattered in fp32; four blocks, of which the
    first waits for its whole message and the others for what their computation does not hide."""
    held, groups, sent = sharing()
    gather, scatter = 7 * 3e-6 + 7 / 8 * 2e6 / 3e11, 7 * 3e-6 + 7 / 8 * 4e6 / 3e11
    assert (sent.gather, sent.scatter) == pytest.approx((gather, scatter))
    other = 7 * 3e-6 + 7 / 8 * 4e5 / 3e11
    gpu = kernels(GPU)
    long = {zero: sharded(zero, held, groups, sent, gpu, PLAIN, 5, 1.0, 1.0) for zero in (1, 2, 3)}
    assert long[1].once_waits == pytest.approx(gather + other + scatter + other)
    assert (long[2].once_waits, long[2].backward_waits) == pytest.approx((gather + other, scatter + other))
    assert (long[3].forward_waits, long[3].backward_waits) == pytest.approx((gather + other, gather + scatter + other))
    short = sharded(3, held, groups, sent, gpu, PLAIN, 5, 0.0, 0.0)
    assert short.forward_waits == pytest.approx(4 * gather + other)
    assert short.backward_waits == pytest.approx(4 * (gather + scatter) + other)


def test_replicas_are_summed_with_the_last_micro_batch() -> None:
    held, groups, sent = sharing(8, 8)
    assert sent.between > 0
    alone = sharded(2, *sharing(8, 1), kernels(GPU), PLAIN, 5, 1.0, 1.0)  # pyright: ignore[reportArgumentType]
    more = sharded(2, held, groups, sent, kernels(GPU), PLAIN, 5, 1.0, 1.0)
    assert more.once_waits - alone.once_waits == pytest.approx(sent.between + sent.other_between)


def test_habits_of_another_code() -> None:
    """Half the bytes of the residual stream, fused operators and messages that overlap: never slower."""
    settings, layout = config(), parse("tp4.sp.dp2.mb2 on 8")
    megatron = Execution(4, 2, 2, 0, 8, True, True, True, 0)
    own, other = predict(settings, layout, GPU), predict(settings, layout, GPU, megatron)
    assert other.parts.compute < own.parts.compute
    assert other.parts.tensor < own.parts.tensor


def test_dropout_costs_its_masks_and_scores_in_memory() -> None:
    plain, dropped = predicted("mb4 on 1"), predicted("mb4 on 1", model={"dropout": 0.1})
    assert dropped.parts.compute > plain.parts.compute


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    settings = config()
    asked = Predictor(settings, 16, GPU)
    names = [name for name in LAYOUTS if name.endswith("on 16")]
    together = [asked.of(parse(name)) for name in names]
    assert together == [predict(settings, parse(name), GPU) for name in names]


def test_links_without_latency_or_end_of_bandwidth_cost_nothing() -> None:
    free = GPU._replace(inside=Link(0.0, inf), between=Link(0.0, inf))
    for name in LAYOUTS:
        assert predicted(name, free).exposed_seconds == pytest.approx(0, abs=1e-12) or "pp" in name
