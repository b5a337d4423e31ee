"""Data parallelism and accumulation equal one process: losses, gradients' norm, clipping, updated weights."""

import numpy as np
import pytest
import torch

from disttrain.config.load import with_values
from disttrain.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from disttrain.engines.native import NativeEngine
from disttrain.mesh import build_mesh
from disttrain.models import build_model
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from tests.ranks import disagreeing, gathered, run_ranks

STEPS, BATCH, SEQUENCE, VOCAB = 5, 8, 16, 61


def config_for(family: str, **values) -> Config:
    model = ModelConfig(
        family=family, layers=2, hidden_size=32, heads=4, ffn_hidden_size=64, max_positions=SEQUENCE, vocab_size=VOCAB,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    train = TrainConfig(steps=STEPS, global_batch_size=BATCH, clip_grad_norm=0.5)
    config = Config(model=model, train=train, optim=OptimConfig(lr=1e-2), precision="fp64")
    return with_values(config, values)


def global_batch(family: str, step: int) -> dict[str, np.ndarray]:
    """Sequences with very different numbers of targets, so that a mean of means would be wrong."""
    rng = np.random.default_rng((7, step))
    tokens = rng.integers(0, VOCAB, (BATCH, SEQUENCE))
    keep = rng.random((BATCH, SEQUENCE)) < np.linspace(0.1, 1, BATCH)[:, None]
    keep[:, 3] = True
    batch = {"tokens": tokens, "targets": np.where(keep, rng.integers(0, VOCAB, (BATCH, SEQUENCE)), -100)}
    if family == "bert":
        lengths = rng.integers(5, SEQUENCE + 1, BATCH)
        batch["attention_mask"] = np.arange(SEQUENCE)[None] < lengths[:, None]
        batch["token_types"] = (np.arange(SEQUENCE)[None] >= lengths[:, None] // 2).astype(np.int64)
        batch["targets"] = np.where(batch["attention_mask"], batch["targets"], -100)
        batch["next_sentence"] = rng.integers(0, 2, BATCH)
    return batch


def make_engine(config: Config, rank: int, world: int) -> NativeEngine:
    groups = make_groups(build_mesh(config.parallel, world), rank, "cpu", Traffic())
    assert config.precision != "auto"
    return NativeEngine(config, groups, torch.device("cpu"), config.precision)


def train(rank: int, config: Config, world: int, micro_batch: int) -> dict:
    engine = make_engine(config, rank, world)
    records, gradients, apart = [], [], []

    def keep_gradients(moment: str) -> None:
        if moment == "reduced":
            gradients.append(gathered(engine, "gradient"))
            apart.extend(disagreeing(engine, "gradient"))

    engine.watch = keep_gradients
    for step in range(1, STEPS + 1):
        batch = global_batch(config.model.family, step)
        share = BATCH // world
        starts = range(rank * share, (rank + 1) * share, micro_batch)
        micro_batches = [{k: v[i : i + micro_batch] for k, v in batch.items()} for i in starts]
        result = engine.step(micro_batches, step, learning_rate=1e-2)
        losses = {name: float(loss.sum / loss.count) for name, loss in result.losses.items()}
        records.append({**losses, "norm": float(result.grad_norm), "tokens": int(result.tokens)})
    traffic = engine.traffic()
    evaluation = {
        k: float(v.sum / v.count) for k, v in engine.evaluate([global_batch(config.model.family, 99)]).items()
    }
    apart.extend(disagreeing(engine, "weight"))
    return {
        "records": records,
        "gradients": gradients,
        "apart": apart,
        "weights": gathered(engine, "weight"),
        "evaluation": evaluation,
        "traffic": traffic,
    }


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_equals_one_process(family: str, world: int, micro_batch: int) -> None:
    config = config_for(family)
    (serial,) = run_ranks(train, 1, config, 1, BATCH)
    all_ranks = run_ranks(train, world, config, world, micro_batch)
    for ours in all_ranks:
        for expected, got in zip(serial["records"], ours["records"], strict=True):
            assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
        assert ours["evaluation"] == pytest.approx(serial["evaluation"], rel=1e-10)
    first = all_ranks[0]  # what the others hold is compared by checksum
    assert first["apart"] == []
    assert len(first["gradients"]) == STEPS
    for expected, got in zip(serial["gradients"], first["gradients"], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)
    for name, weight in serial["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-10, atol=1e-10)


def test_clipping_and_training_happen() -> None:
    """The comparison above would also hold for an engine that does nothing."""
    config = config_for("gpt")
    (clipped,) = run_ranks(train, 1, config, 1, BATCH)
    (free,) = run_ranks(train, 1, with_values(config, {"train.clip_grad_norm": None}), 1, BATCH)
    initial = build_model(config.model, config.run.seed, torch.float64)
    assert clipped["records"][0]["norm"] > 0.5  # clipping was at work
    assert clipped["records"][0] == free["records"][0]  # the norm reported is that before clipping
    assert any(not torch.equal(clipped["weights"][n], free["weights"][n]) for n in free["weights"])
    assert all(not torch.equal(clipped["weights"][n], p) for n, p in initial.named_parameters() if p.ndim > 1)


def test_first_step_equals_plain_torch() -> None:
    """One step against AdamW, clipping and cross-entropy written out by hand."""
    config = with_values(config_for("gpt"), {"optim.weight_decay": 0.1})
    (ours,) = run_ranks(one_step, 1, config)
    model = build_model(config.model, config.run.seed, torch.float64)
    batch = {k: torch.from_numpy(v) for k, v in global_batch("gpt", 1).items()}
    logits = model(batch["tokens"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8).step()
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert ours["norm"] == pytest.approx(norm.item(), rel=1e-12)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours["weights"][name], weight.detach(), rtol=1e-12, atol=1e-12)


def one_step(rank: int, config: Config) -> dict:
    engine = make_engine(config, rank, 1)
    result = engine.step([global_batch("gpt", 1)], 1, learning_rate=1e-2)
    loss = result.losses["lm"]
    return {
        "loss": float(loss.sum / loss.count),
        "norm": float(result.grad_norm),
        "weights": gathered(engine, "weight"),
    }


def test_bytes_on_the_wire() -> None:
    """Gradients cross once a step, whatever the accumulation; a world of one sends nothing."""
    config = config_for("gpt")
    gradients = sum(p.numel() for p in build_model(config.model, 1, torch.float64).parameters()) * 8
    assert run_ranks(train, 1, config, 1, 2)[0]["traffic"] == (0, 0, 0.0)
    for result in run_ranks(train, 2, config, 2, 1):
        control = (2 * 8 + 8 + 8) * STEPS  # counts and tokens (int64), loss sums, squared norm (fp64)
        assert result["traffic"][:2] == (gradients * STEPS + control, gradients * STEPS + control)


def overflow(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    model = engine.chunks[0].model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if rank == world - 1:  # only the last rank's gradients overflow
        next(iter(model.parameters())).register_hook(lambda g: g * float("inf"))
    share = BATCH // world
    batch = {k: v[rank * share : (rank + 1) * share] for k, v in global_batch("gpt", 1).items()}
    result = engine.step([batch], 1, learning_rate=1e-2)
    same = all(torch.equal(before[n], p) for n, p in model.named_parameters())
    return {
        "skipped": result.skipped,
        "unchanged": same,
        "scale": engine.scale.value,
        "state": len(engine.optimizer.state),
    }


def test_all_ranks_skip_together() -> None:
    config = with_values(config_for("gpt"), {"precision": "fp16"})
    for result in run_ranks(overflow, 2, config, 2):
        assert result == {"skipped": True, "unchanged": True, "scale": 32768.0, "state": 0}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_low_precision_follows_fp64(precision: str, tolerance: float) -> None:
    """Losses of five steps, relative to fp64: rounding of the compute type, not more."""
    (reference,) = run_ranks(train, 1, config_for("gpt"), 1, BATCH)
    for ours in run_ranks(train, 2, config_for("gpt", precision=precision), 2, 2):
        for expected, got in zip(reference["records"], ours["records"], strict=True):
            assert got == pytest.approx(expected, rel=tolerance)
