"""Predictions against what they predict: parameters as they are cut, torch's own schedules, ZeRO's formulas."""

import subprocess
import sys
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch.distributed.pipelining.schedules import get_schedule_class

from disttrain import costs, memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config, ModelConfig, ParallelConfig
from disttrain.mesh import build_mesh
from disttrain.models import build_model
from disttrain.moments import InFlight, Parameters, Sharing, moments
from disttrain.overview import overview
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import Group
from disttrain.parallel.pipeline import TORCH_NAMES, keep_stage
from disttrain.parallel.tensor import apply_tensor_parallel
from disttrain.stages import SCHEDULES, stage_numbers, virtual_stages

FAMILIES = ("gpt", "bert")


def model_of(family: str, **values: Any) -> ModelConfig:
    shape = {"layers": 3, "hidden_size": 24, "heads": 4, "ffn_hidden_size": 64, "max_positions": 16, "vocab_size": 61}
    return ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape, **values})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("layers", [(0, 3), (0, 2), (1, 2), (2, 3)])
def test_shapes_are_those_of_the_model_as_it_is_cut(family: str, tensor: int, layers: tuple[int, int]) -> None:
    """A vocabulary of 61 over 4 ranks: 16, 16, 16 and 13 rows."""
    config, first, last = model_of(family), layers[0] == 0, layers[1] == 3
    for rank in range(tensor):
        model = build_model(config, 1, device="meta")
        keep_stage(model, range(*layers), first, last)
        group = Group(tensor, rank, tuple(range(tensor)), None, Traffic())
        apply_tensor_parallel(model, group, sequence=False)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert memory.parameter_shapes(config, range(*layers), first, last, tensor, rank) == expected
        assert sum(map(prod, expected.values())) <= sum(
            map(prod, memory.parameter_shapes(config, range(*layers), first, last, tensor).values())
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_has_the_parameters_of_costs(family: str) -> None:
    config = model_of(family)
    assert sum(map(prod, memory.parameter_shapes(config, range(3)).values())) == costs.parameter_count(config).total


NOTHING = costs.ActivationBytes(0.0, 0.0)


def at_moments(stage: Parameters, zero: int, ranks: int, wide: int = 4, narrow: int = 4, several: bool = True) -> Any:
    """Of a rank whose activations are nothing, as one of so many ranks."""
    sharing = Sharing(zero, several, ranks > 1, False, 0.0)
    return moments(stage, sharing, InFlight(1, 1, several, 1, 1, 0), NOTHING, NOTHING, wide, narrow)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("wide", [4, 8])
def test_zero_follows_the_paper(ranks: int, wide: int) -> None:
    """Sixteen bytes a parameter in fp32 (K = 12 and a gradient) in the shares of Rajbhandari et al. 2020, figure 1; DDP has
    its buckets beside the gradients that are added up."""
    model = model_of("gpt", vocab_size=64)
    whole = memory.of_stage(model, 3, True, True, 1, 1)
    stage = memory.of_stage(model, 3, True, True, 1, ranks)
    shapes = memory.parameter_shapes(model, range(3))
    norms = sum(prod(shape) for name, shape in shapes.items() if "_norm." in name)  # not sharded
    p = sum(map(prod, shapes.values())) - norms
    blocks = sum(prod(shape) for name, shape in shapes.items() if name.startswith("blocks.")) - norms
    assert (stage.whole, stage.held) == (p + norms, p / ranks + norms)
    expected = {
        0: (whole.whole * (2 if ranks > 1 else 1), 0),
        1: (whole.whole, p),
        2: (stage.held, p),
        3: (stage.held, p - 2 * blocks / 3),
    }
    for zero, (gradients, copies) in expected.items():
        found = at_moments(stage if zero else whole, zero, ranks, wide, wide)
        assert found["end"].gradients == wide * gradients
        assert found["block"].copies == wide * copies
    once = at_moments(stage, 1, ranks, several=False)  # scattered at once, as at stage 2
    assert once["end"].gradients == 4 * stage.held and once["head"].gradients == 0


STAGE = Parameters(
    whole=62, held=31, block=8, blocks=4, longest=4, rest=30, head=20, embedding=20, tied=True, largest=5
)


def test_low_precision_has_copies() -> None:
    """Autocast makes them of all that is multiplied; ZeRO gathers blocks in low precision, and the rest in the master
    type."""
    assert at_moments(STAGE, 0, 2, narrow=2)["head"].copies == 2 * (4 * 8 + 20)
    assert at_moments(STAGE, 0, 2, narrow=2)["block"].copies == 2 * 4 * 8  # that of the head has gone
    assert at_moments(STAGE, 2, 2, narrow=2)["head"].copies == 2 * 4 * 8 + 4 * 30 + 2 * 20
    assert at_moments(STAGE, 3, 2, narrow=2)["block"].copies == 2 * 8 + 4 * 30


def test_what_comes_and_goes() -> None:
    """Under ZeRO-3 in bf16: the gathered block that comes next, gradients of the block, those that are scattered; the weight
    that head and embedding share waits for its second gradient."""
    found = at_moments(STAGE, 3, 2, narrow=2)
    assert found["head"].buffers == 4 * 30  # what was outside blocks in the micro-batch before
    assert found["block"].buffers == 4 * 20 + 2 * 8 * 2 + 4 * 30
    assert found["embedding"].buffers == 4 * (3 * 20 + 30)
    plain = at_moments(STAGE, 0, 1)
    assert plain["block"].buffers == 4 * 20 + 4 * 5
    assert plain["embedding"].buffers == 4 * 3 * 20


def test_gradients_of_a_pipeline_are_summed_in_flat_copies() -> None:
    flight = InFlight(chunks=3, heads=0, again=0.0, end=3, late=3, waiting=0)
    found = moments(STAGE, Sharing(0, True, True, True, 10.0), flight, costs.ActivationBytes(7.0, 5.0), NOTHING, 4, 2)
    assert found["sum"].total == 2 * 4 * 62
    assert found["block"].activations == 3 * 4 * 7 + 5 and found["block"].gradients == 0
    assert found["block"].buffers - found["end"].buffers == 0 and found["head"].buffers == 4 * 10.0
    assert found["end"].activations == 2 * 4 * 7 + 7 + 5 and found["end"].gradients == 4 * 62
    assert found["block"].copies == 2 * 3 * 4 * 8


def test_many_layouts_at_once_are_each_by_itself() -> None:
    zeros, several = np.array([[0, 1, 2, 3]]), np.array([[False], [True]])
    together = at_moments(STAGE, zeros, 2, 4, 2, several)  # pyright: ignore[reportArgumentType]
    for row, some in enumerate((False, True)):
        for zero in range(4):
            alone = at_moments(STAGE, zero, 2, 4, 2, some)
            for name, moment in together.items():
                assert np.broadcast_to(moment.total, (2, 4))[row, zero] == alone[name].total


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    model = model_of("gpt", vocab_size=61)
    rows = {n: s for n, s in memory.parameter_shapes(model, range(0)).items() if n.startswith("embed.tokens")}
    assert rows == {"embed.tokens.weight": (61, 24)}
    whole, cut = (memory.of_stage(model, 0, True, False, 1, shards) for shards in (1, 4))
    assert whole.held == whole.whole == cut.whole == (61 + 16) * 24 and cut.held == (16 + 4) * 24


def actions_of(schedule: str, size: int, virtual: int, micro_batches: int) -> dict[int, list]:
    """torch's own list of what each rank does; empty where it refuses the numbers."""
    stages = [
        SimpleNamespace(
            group_size=size, num_stages=size * virtual, group_rank=0, group=None, device="cpu", has_backward=True,
            is_first=True, is_last=False, stage_index=i * size, submod=None, stage_index_to_group_rank={},
        )
        for i in range(virtual)
    ]  # fmt: skip
    made: Any = get_schedule_class(TORCH_NAMES[schedule])
    try:
        return made(stages, micro_batches, loss_fn=lambda output, target: 0).pipeline_order
    except ValueError:
        return {}


def most_held(actions: list, last: int) -> tuple[int, int]:
    """Most activations held at once, each from its forward pass to the gradient of its weights; and of the last stage."""
    held: set[tuple[int, int]] = set()
    most = most_last = 0
    for action in actions:
        for part in () if action is None else action.sub_actions or (action,):
            chunk, kind = (part.stage_index, part.microbatch_index), part.computation_type.name
            if kind == "FORWARD":
                held.add(chunk)
            elif kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"):
                held.remove(chunk)
            most = max(most, len(held))
            most_last = max(most_last, sum(stage == last for stage, _ in held))
    return most, most_last


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("gpipe", "1f1b")])
def test_activations_in_flight_are_those_of_torchs_schedules(schedule: str) -> None:
    compared = 0
    for size in (2, 3, 4):
        for virtual in {virtual_stages(schedule), virtual_stages(schedule, 3)}:
            last = size * virtual - 1
            for micro_batches in range(1, 14):
                for rank, actions in actions_of(schedule, size, virtual, micro_batches).items():
                    expected, of_last = most_held(actions, last)
                    got, got_last = memory.in_flight(schedule, rank, size, virtual, micro_batches)
                    assert got == expected or (schedule == "zbv" and micro_batches < 2 * size and got > expected)
                    if last in stage_numbers(schedule, rank, size, virtual):
                        assert got_last == of_last
                    compared += 1
    assert compared >= 50


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_gradients_of_weights_wait_as_in_torchs_schedules(schedule: str) -> None:
    """So many chunks are held, and so many of them wait, at one moment of torch's list; and never more of both."""
    for size in (2, 4, 8):
        for rank, actions in actions_of(schedule, size, 2, 3 * size).items():
            at = memory.flight(schedule, rank, size, 2, 3 * size, False)
            seen = held_and_waiting(actions)
            assert (at.late, at.waiting) in seen, (size, rank)
            for share in (0.7, 3.0):
                most = max(held + share * waiting for held, waiting in seen)
                assert max(at.chunks + share, at.late + share * at.waiting) == pytest.approx(most), (size, rank, share)


def held_and_waiting(actions: list) -> set[tuple[int, int]]:
    """Chunks that are held, and those of them whose weights' gradients are still to come, after every action."""
    held: set[tuple[int, int]] = set()
    waiting: set[tuple[int, int]] = set()
    seen = set()
    for action in actions:
        for part in () if action is None else action.sub_actions or (action,):
            chunk, kind = (part.stage_index, part.microbatch_index), part.computation_type.name
            if kind == "FORWARD":
                held.add(chunk)
            elif kind == "BACKWARD_INPUT":
                waiting.add(chunk)
            else:
                held.discard(chunk)
                waiting.discard(chunk)
            seen.add((len(held), len(waiting)))
    return seen


def test_a_short_step_has_gradients_when_activations_go() -> None:
    """Interleaved in two rounds of two: all six are forward before the first of three stages has a gradient."""
    short = memory.flight("interleaved_1f1b", 0, 2, 3, 2, False)
    assert (short.chunks, short.again, short.end) == (6, 0.0, 2)
    long = memory.flight("interleaved_1f1b", 0, 2, 3, 12, False)
    assert (long.again, long.end) == (1.0, long.chunks)
    first = memory.flight("looped_bfs", 0, 2, 4, 3, False)
    assert (first.chunks, first.again, first.end) == (12, 0.0, 3)


def test_activations_in_flight_of_one_stage_a_rank() -> None:
    assert [memory.in_flight("1f1b", rank, 4, 1, 8)[0] for rank in range(4)] == [4, 3, 2, 1]
    assert memory.in_flight("1f1b", 0, 4, 1, 4) == (4, 1)
    assert memory.in_flight("gpipe", 0, 4, 1, 8) == (8, 8)


BASE = Config.model_validate({"train": {"steps": 1, "global_batch_size": 16, "micro_batch_size": 1}})


def predicted(world_size: int, **parallel: Any) -> list[memory.RankMemory]:
    model = model_of("gpt", layers=8, max_positions=128, vocab_size=64)
    config = with_values(BASE, {"model": model, "parallel": ParallelConfig(**parallel)})
    mesh = build_mesh(config.parallel, world_size)
    return memory.predict(config, mesh, "fp32", 16 // mesh.data_ranks)


def block_and_head(**parallel: Any) -> tuple[costs.ActivationBytes, costs.ActivationBytes]:
    """Of one sequence of 128 tokens in fp32."""
    model = model_of("gpt", layers=8, max_positions=128, vocab_size=64)
    config = with_values(BASE, {"model": model})
    return memory.activations_of(config, "fp32", "cuda", ParallelConfig(**parallel), 1, "none")[:2]


def test_one_rank_holds_all_of_the_state_and_one_micro_batch() -> None:
    """Sixteen micro-batches of one sequence: gradients are there when the last one begins its backward pass."""
    (one,) = predicted(1)
    model = model_of("gpt", layers=8, max_positions=128, vocab_size=64)
    assert one.state == tuple(costs.parameter_count(model).total * n for n in costs.state_bytes_per_parameter("fp32"))
    assert (one.layers, one.host, one.moment) == ([range(8)], 0, "head")
    block, head = block_and_head()
    assert one.activations == pytest.approx(8 * block.saved + head.saved + head.working)
    assert one.total == one.state.total + one.activations + one.buffers


def test_what_each_axis_divides() -> None:
    (one_block, one_head), (context, _), (tensor, head) = (
        block_and_head(),
        block_and_head(context=4),
        block_and_head(tensor=4),
    )
    (sequence, _), h, tokens = block_and_head(tensor=4, sequence=True), 24, 128
    assert context.saved == pytest.approx(one_block.saved / 4)
    assert one_block.saved - tensor.saved == pytest.approx(0.75 * tokens * ((4 * h + 2 * 64) * 4 + 4 * 4))
    assert tensor.saved - sequence.saved == pytest.approx(0.75 * tokens * 16 * h)
    assert one_head.saved - head.saved == pytest.approx(0.75 * 4 * 64 * tokens)
    (one,), (cut,), (split,) = predicted(1), predicted(4, tensor=4), predicted(4, tensor=4, sequence=True)
    assert one.parameters / 4 < cut.parameters < one.parameters / 3
    assert cut.state == split.state and split.total < cut.total < one.total


def test_a_pipeline_splits_the_layers_and_holds_what_is_in_flight() -> None:
    (one,), ranks = predicted(1), predicted(4, pipeline=4)
    tied = 64 * 24
    assert sum(rank.parameters for rank in ranks) == one.parameters + tied
    assert [part for rank in ranks for part in rank.layers] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    block, _ = block_and_head(pipeline=4)
    assert [rank.moment for rank in ranks] == ["block", "block", "block", "head"]
    for rank, chunks in zip(ranks[:3], (4, 3, 2), strict=True):
        assert rank.activations == pytest.approx(chunks * 2 * block.saved + block.working)
        handed_on = (chunks + 1) * 4 * 24 * 128  # and a gradient that comes or goes
        assert rank.buffers == pytest.approx(handed_on + 4 * 24 * 3 * 24)  # the gradient of qkv
    gpipe = predicted(4, pipeline=4, schedule="gpipe")
    assert gpipe[0].activations == pytest.approx(16 * 2 * block.saved + block.working)
    assert (gpipe[0].moment, gpipe[0].state.gradient) == ("block", 0)  # all 16 are there before the first gradient
    assert ranks[0].state.gradient == ranks[0].state.weight
    looped = predicted(4, pipeline=4, schedule="zbv")
    assert [part for part in looped[0].layers] == [range(0, 1), range(7, 8)]
    assert looped[0].parameters == looped[1].parameters + (64 + 128) * 24 + 2 * 24 + tied


def test_zero_shards_over_shard_and_context_and_offloads() -> None:
    (one,), (shared,) = predicted(1), predicted(4, context=2, zero=3)
    norms = 8 * 4 * 24 * 4  # bytes of the blocks' norms, which stay whole
    assert shared.state.weight - norms == (one.state.weight - norms) / 4
    (replicas,) = predicted(4, zero=3, replicate=2)
    assert replicas.state.weight - norms == (one.state.weight - norms) / 2
    (moved,), (stage1,) = predicted(2, zero=2, offload=True), predicted(2, zero=1, offload=True)
    assert moved.host == moved.state.total - moved.state.compute_copy
    assert stage1.host == stage1.state.weight + stage1.state.optimizer
    assert moved.total == moved.state.compute_copy + moved.activations + moved.buffers


def test_check_shows_the_layout(tmp_path: Any) -> None:
    values = {"model": model_of("gpt", layers=8, max_positions=128), "run.dir": str(tmp_path)}
    parallel = {
        "tensor": 2,
        "sequence": True,
        "pipeline": 2,
        "schedule": "zbv",
        "context": 2,
        "zero": 2,
        "offload": True,
    }
    config = with_values(BASE, {**values, "parallel": ParallelConfig.model_validate(parallel)})
    console = Console(width=120)
    with console.capture() as shown:
        console.print(overview(config, 16))
    text = shown.get()
    expected = [
        "pipeline 2 x replicate 1 x shard 2 x context 2 x tensor 2", "2 heads a rank", "64 of 128 tokens a rank, ring",
        "zbv, 8 micro-batches, theoretical bubble 2.0%", "layers 0-1 and 6-7", "layers 2-3 and 4-5",
        "stage 2 over 4 ranks, kept in host memory", "pipeline rank 1, the worst", "of these in host memory",
    ]  # fmt: skip
    for words in expected:
        assert words in text, text


def test_memory_and_layout_import_no_torch() -> None:
    code = "import sys, disttrain.memory, disttrain.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
