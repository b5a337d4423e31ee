"""Predictions against what they predict: parameters as they are cut, torch's own schedules, ZeRO's formulas."""

import subprocess
import sys
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch.distributed.pipelining.schedules import get_schedule_class

from disttrain import costs, memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config, ModelConfig, ParallelConfig
from disttrain.mesh import build_mesh
from disttrain.models import build_model
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


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("precision", "wide"), [("fp32", 4), ("fp64", 8)])
def test_zero_follows_the_paper(ranks: int, precision: Any, wide: int) -> None:
    """Sixteen bytes a parameter (K = 12 and a gradient) in the shares of Rajbhandari et al. 2020, figure 1."""
    shapes = memory.parameter_shapes(model_of("gpt", vocab_size=64), range(3))
    assert sum(1 for name in shapes if "_norm." in name) == 12
    norms = sum(prod(shape) for name, shape in shapes.items() if "_norm." in name)  # not sharded
    p = sum(map(prod, shapes.values())) - norms
    blocks = sum(prod(shape) for name, shape in shapes.items() if name.startswith("blocks.")) - norms
    held = p / ranks + norms
    expected = {
        0: (p + norms, 0, p + norms, 2 * (p + norms)),
        1: (held, p, p + norms, 2 * held),
        2: (held, p, held, 2 * held),
        3: (held, p - blocks / 3, held, 2 * held),
    }
    for zero, elements in expected.items():
        assert memory.zero_bytes(shapes, zero, ranks, precision) == pytest.approx(
            [wide * e for e in elements], rel=1e-12
        )
    once = memory.zero_bytes(shapes, 1, ranks, precision, accumulates=False)
    assert once == memory.zero_bytes(shapes, 2, ranks, precision)


def test_zero_in_low_precision_gathers_half_of_the_blocks() -> None:
    shapes = {"embed.tokens.weight": (10, 3), "blocks.0.w": (4, 2), "blocks.1.w": (4, 2), "blocks.2.w": (4, 2)}
    assert memory.zero_bytes(shapes, 0, 2, "bf16") == (4 * 54, 2 * 54, 4 * 54, 8 * 54)
    assert memory.zero_bytes(shapes, 2, 2, "fp16") == (4 * 27, 6 * 30 + 2 * 24, 4 * 27, 8 * 27)
    assert memory.zero_bytes(shapes, 3, 2, "bf16").compute_copy == 6 * 30 + 2 * 16


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    assert memory.zero_bytes({"embed.tokens.weight": (5, 3), "embed.norm": (1,)}, 3, 4, "fp32").weight == 4 * (
        2 * 3 + 1
    )


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


def test_one_rank_is_as_before() -> None:
    (one,) = predicted(1)
    model = model_of("gpt", layers=8, max_positions=128, vocab_size=64)
    assert one.state == tuple(costs.parameter_count(model).total * n for n in costs.state_bytes_per_parameter("fp32"))
    assert one.activations == costs.activation_bytes(model, 128, 1, "fp32")
    assert (one.layers, one.host) == ([range(8)], 0)


def test_what_each_axis_divides() -> None:
    (one,), (context,) = predicted(1), predicted(4, context=4)
    assert context.state == one.state
    assert context.activations == pytest.approx([n / 4 for n in one.activations])
    (tensor,), (sequence,) = predicted(4, tensor=4), predicted(4, tensor=4, sequence=True)
    h, tokens = 24, 128
    logits = 2 * 4 * 64 * tokens  # held and their gradient
    assert one.activations.total - tensor.activations.total == pytest.approx(
        0.75 * (8 * tokens * ((4 * h + 2 * 64) * 4 + 4 * 4) + logits)
    )
    assert tensor.activations.total - sequence.activations.total == pytest.approx(0.75 * 8 * tokens * 16 * h)
    assert tensor.state == sequence.state
    assert one.parameters / 4 < tensor.parameters < one.parameters / 3


def test_a_pipeline_splits_the_layers_and_holds_what_is_in_flight() -> None:
    (one,), ranks = predicted(1), predicted(4, pipeline=4)
    tied = 64 * 24
    assert sum(rank.parameters for rank in ranks) == one.parameters + tied
    assert [part for rank in ranks for part in rank.layers] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    blocks = [rank.activations.saved for rank in ranks[:3]]
    assert blocks == pytest.approx([blocks[2] * n / 2 for n in (4, 3, 2)])
    gpipe = predicted(4, pipeline=4, schedule="gpipe")
    assert gpipe[0].activations.saved == pytest.approx(4 * blocks[0])
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
    assert moved.total == moved.state.compute_copy + moved.activations.total


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
        "stage 2 over 4 ranks, kept in host memory", "pipeline rank 0, the worst", "of these in host memory",
    ]  # fmt: skip
    for words in expected:
        assert words in text, text


def test_memory_and_layout_import_no_torch() -> None:
    code = "import sys, disttrain.memory, disttrain.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
