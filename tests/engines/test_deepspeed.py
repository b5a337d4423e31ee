"""The DeepSpeed engine equals the native one on one process: every stage, precision, accumulation, resume, other engines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain import checkpoint, engines
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.deepspeed_config import problems, translate
from disttrain.engines.deepspeed import quiet_deepspeed
from disttrain.mesh import build_mesh
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from disttrain.precision import LossScale
from disttrain.verify.batches import micro_batches
from tests.chosen import ALL, chosen
from tests.components import need
from tests.parallel.test_data_parallel import config_for, global_batch
from tests.ranks import disagreeing, gathered, run_ranks

STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Ranks are forked, and need not import it again."""
    need("deepspeed")
    quiet_deepspeed("cpu")


def make(config: Config, rank: int, world: int) -> Any:
    groups = make_groups(build_mesh(config.parallel, world), rank, "cpu", Traffic())
    assert config.precision != "auto"
    return engines.build(config, groups, torch.device("cpu"), config.precision)


def advance(engine: Any, family: str, steps: range) -> list[dict[str, Any]]:
    """What each step said, on this rank."""
    seen = []
    groups, size = engine.groups, engine.config.train.micro_batch_size
    for step in steps:
        batches = micro_batches(
            global_batch(family, step), groups.mesh.data_rank(groups.rank), groups.mesh.data_ranks, size
        )
        result = engine.step(batches, step + 1, 0.01)
        losses = {name: float(loss.sum) / float(loss.count) for name, loss in result.losses.items()}
        seen.append({"losses": losses, "norm": float(result.grad_norm), "scale": result.loss_scale,
                     "skipped": result.skipped, "tokens": int(result.tokens)})  # fmt: skip
    return seen


def train(rank: int, config: Config, world: int, family: str) -> dict[str, Any]:
    engine = make(config, rank, world)
    gradients: list[dict] = []
    engine.watch = lambda moment: gradients.append(gathered(engine, "gradient")) if moment == "reduced" else None
    seen = advance(engine, family, range(STEPS))
    mine = micro_batches(global_batch(family, 99), engine.groups.mesh.data_rank(rank), world, None)
    scores = {name: float(total) / float(count) for name, (total, count) in engine.evaluate(mine).items()}
    found = {"seen": seen, "scores": scores, "gradients": gradients, "weights": gathered(engine, "weight"),
             "apart": disagreeing(engine, "parameter")}  # fmt: skip
    engine.close()
    return found


def trained(config: Config, world: int, family: str = "gpt") -> list[dict[str, Any]]:
    return run_ranks(train, world, config, world, family, timeout_s=200)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    """One process, natively, by family."""
    return {f: trained(config_for(f, precision="fp32"), 1, f)[0] for f in ("gpt", "bert")}


CASES = [
    # family, ranks, stage, micro-batch, offload, recompute
    ("gpt", 2, 0, 2, False, "none"), ("gpt", 2, 1, 4, False, "full"), ("gpt", 4, 2, 1, False, "none"),
    ("gpt", 2, 3, 2, False, "none"), ("gpt", 2, 3, 4, True, "selective"), ("bert", 2, 0, 4, False, "full"),
    ("bert", 4, 1, 1, True, "none"), ("bert", 2, 2, 1, True, "selective"), ("bert", 2, 3, 2, False, "full"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "world", "zero", "size", "offload", "recompute"), CASES)
def test_equals_one_process(
    references: dict, family: str, world: int, zero: int, size: int, offload: bool, recompute: str
) -> None:
    """float32: losses, norms and scores to 2e-6, the first step's gradients to 1e-5 of their tensor, weights to 1e-3.

    Adam turns the rounding of a gradient that is zero but for rounding (a key's bias) into a step of its own: those
    biases are left out of the weights.
    """
    values = {"engine": "deepspeed", "parallel.zero": zero, "parallel.offload": offload,
              "parallel.recompute": recompute, "train.micro_batch_size": size}  # fmt: skip
    found = trained(config_for(family, precision="fp32", **values), world, family)
    expected = references[family]
    for ours in found:
        for got, want in zip(ours["seen"], expected["seen"], strict=True):
            assert got["losses"] == pytest.approx(want["losses"], rel=2e-6)
            assert got["norm"] == pytest.approx(want["norm"], rel=2e-6)
            assert (got["tokens"], got["skipped"], got["scale"]) == (want["tokens"], False, 1.0)
        assert ours["scores"] == pytest.approx(expected["scores"], rel=2e-6)
    first = found[0]
    assert first["apart"] == []
    assert min(got["norm"] for got in first["seen"]) > 0.5  # every step is clipped
    largest = max(float(g.abs().max()) for g in expected["gradients"][0].values())
    for name, want in expected["gradients"][0].items():
        assert float((first["gradients"][0][name] - want).abs().max()) < 1e-5 * (
            float(want.abs().max()) + 1e-2 * largest
        )
    for name, want in expected["weights"].items():
        if not name.endswith("qkv.bias"):
            assert relative(first["weights"][name], want) < 1e-3, name


@pytest.mark.parametrize(
    ("precision", "zero"), chosen([("bf16", 0), ("bf16", 2), ("fp16", 1), ("fp16", 3), ("bf16", 3)], 2)
)
def test_low_precision(references: dict, precision: str, zero: int) -> None:
    """bf16 to 1e-2 and fp16 to 3e-3 of the losses in float32."""
    values = {"engine": "deepspeed", "parallel.zero": zero, "train.micro_batch_size": 2, "precision": precision}
    found = trained(config_for("gpt", **values), 2)
    bound = 1e-2 if precision == "bf16" else 3e-3
    for ours in found:
        for got, want in zip(ours["seen"], references["gpt"]["seen"], strict=True):
            assert got["losses"] == pytest.approx(want["losses"], rel=bound)
            assert got["norm"] == pytest.approx(want["norm"], rel=4 * bound)
            assert not got["skipped"]
        assert ours["apart"] == []


@pytest.mark.parametrize("zero", [1, 3])
def test_overflow_is_skipped_by_all_and_the_scale_is_ours(zero: int) -> None:
    """From a large one the scale is halved on every rank until the gradients fit, as our own state machine has it."""
    values = {"engine": "deepspeed", "parallel.zero": zero, "precision": "fp16", "loss_scale.initial": 2.0**19,
              "loss_scale.growth_interval": 2}  # fmt: skip
    found = trained(config_for("gpt", **values), 2)
    skips = [got["skipped"] for got in found[0]["seen"]]
    assert skips[0] and not skips[-1], skips
    scale = LossScale(2.0**19, 2, 1.0)
    for step, skipped in enumerate(skips):
        assert {ours["seen"][step]["scale"] for ours in found} == {scale.value}
        assert {ours["seen"][step]["skipped"] for ours in found} == {skipped}
        assert np.isfinite(found[0]["seen"][step]["norm"]) == (not skipped)
        scale = scale.after(skipped)


def save(rank: int, config: Config, world: int, folder: Path) -> list[dict[str, Any]]:
    """Three steps, a checkpoint, two more."""
    engine = make(config, rank, world)
    advance(engine, "gpt", range(3))
    state = engine.state_dict()
    checkpoint.save(folder, 3, state, {"step": 3, "engine": state.pop("engine")}, keep=1)
    seen = advance(engine, "gpt", range(3, STEPS))
    engine.close()
    return seen


def resume(rank: int, config: Config, world: int, folder: Path) -> list[dict[str, Any]]:
    engine = make(config, rank, world)
    state = engine.to_fill(dict)
    trainer = checkpoint.load(folder / "step_00000003", state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    seen = advance(engine, "gpt", range(3, STEPS))
    engine.close()
    return seen


def test_its_flops_profiler(tmp_path: Path) -> None:
    """Raw settings reach DeepSpeed: its profiler writes its table."""
    profiler = {"enabled": True, "profile_step": 2, "detailed": False, "output_file": str(tmp_path / "flops.txt")}
    trained(config_for("gpt", precision="fp32", engine="deepspeed", deepspeed={"flops_profiler": profiler}), 1)
    text = (tmp_path / "flops.txt").read_text()
    assert "DeepSpeed Flops Profiler" in text and "MACs" in text and "Attention" in text, text


NATIVE, STAGES = {"engine": "native"}, [{"engine": "deepspeed", "parallel.zero": zero} for zero in range(4)]
MOVES = [
    # from (settings, ranks) to (settings, ranks)
    (STAGES[0], 2, STAGES[0], 2), (STAGES[1], 2, STAGES[1], 2), (STAGES[2], 2, STAGES[3], 4),
    (STAGES[3], 4, STAGES[1], 2), (STAGES[2], 2, NATIVE, 1), (NATIVE, 2, STAGES[2], 2),
    ({"engine": "native", "parallel.zero": 3}, 2, STAGES[0], 1),
    *([(STAGES[3], 2, STAGES[3], 2)] if ALL else []),
]  # fmt: skip
"""Every stage is saved and loaded here; of stage 3 that is done under two worlds already."""


@pytest.mark.parametrize(("before", "ranks", "after", "later"), MOVES)
def test_checkpoints_move(tmp_path: Path, before: dict, ranks: int, after: dict, later: int) -> None:
    """A run goes on under another stage, world size or engine as if it had not stopped: losses to 2e-6, norms to 1e-5."""
    config = config_for("gpt", precision="fp32")
    expected = run_ranks(save, ranks, with_values(config, before), ranks, tmp_path, timeout_s=200)[0]
    found = run_ranks(resume, later, with_values(config, after), later, tmp_path, timeout_s=200)[0]
    for got, want in zip(found, expected, strict=True):
        assert got["losses"] == pytest.approx(want["losses"], rel=2e-6)
        assert got["norm"] == pytest.approx(want["norm"], rel=1e-5)
        assert got["scale"] == want["scale"]


def bytes_of_a_step(rank: int, config: Config, world: int) -> tuple[int, int]:
    engine = make(config, rank, world)
    advance(engine, "gpt", range(1))
    engine.traffic()
    advance(engine, "gpt", range(1, 2))
    sent = engine.traffic()[0]
    parameters = sum(p.numel() for p in engine.model.parameters())
    engine.close()
    return sent, parameters


def test_bytes_are_counted() -> None:
    """Stage 0 hands every gradient to one all-reduce a step: 4 bytes a parameter, and some numbers."""
    config = config_for("gpt", precision="fp32", engine="deepspeed")
    for sent, parameters in run_ranks(bytes_of_a_step, 2, config, 2, timeout_s=200):
        assert 4 * parameters <= sent <= 4 * parameters + 200


def test_translation() -> None:
    """What our settings become, and that a user's own are added."""
    config = config_for("gpt", **{
        "engine": "deepspeed", "precision": "fp16", "parallel.zero": 3, "parallel.offload": True,
        "train.micro_batch_size": 2,
        "train.clip_grad_norm": None, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}},
    })  # fmt: skip
    found = translate(config, 2)
    assert json.loads(json.dumps(found)) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
            "reduce_bucket_size": 1000,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1,
                 "min_loss_scale": 1.0},
    }  # fmt: skip
    assert translate(config_for("gpt", engine="deepspeed"), 1)["gradient_clipping"] == 0.5
    assert "torch_autocast" in translate(config_for("gpt", engine="deepspeed", precision="bf16"), 1)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"precision": "fp16"}, "parallel.zero=0"),
        ({"precision": "fp16", "parallel.zero": 1, "loss_scale.initial": 1000.0}, "loss_scale.initial=1000.0"),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "train.clip_grad_norm"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "parallel.zero"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "precision"),
        ({"deepspeed": {"sequence_parallel_size": 2}}, "deepspeed.sequence_parallel_size=2"),
        ({"deepspeed": {"zero_optimisation": {"overlap_comm": True}}}, "deepspeed.zero_optimisation.overlap_comm=True"),
    ],
)
def test_refusals(values: dict, settings: str) -> None:
    """What DeepSpeed would do wrongly, or take without a word, is refused with both settings named."""
    (problem,) = problems(config_for("gpt", **{"precision": "fp32", "engine": "deepspeed", **values}))
    assert any(s.startswith(settings) for s in problem.settings), problem
