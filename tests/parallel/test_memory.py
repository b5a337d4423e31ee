"""Bytes that a rank really holds in a step, against the elements of `disttrain.memory`, stage by stage."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from disttrain import memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config, ParallelConfig
from disttrain.mesh import build_mesh
from tests.parallel.test_data_parallel import config_for, make_engine
from tests.ranks import run_ranks

SEQUENCE, VOCAB, LAYERS = 2, 64, 4
"""Two tokens: activations, and the buffer in which FSDP2 reduced the embedding last, are nothing beside the blocks."""
MODEL = {
    "model.layers": LAYERS, "model.hidden_size": 64, "model.ffn_hidden_size": 256, "model.max_positions": SEQUENCE,
    "model.vocab_size": VOCAB, "data.sequence_length": SEQUENCE, "precision": "fp32",
}  # fmt: skip


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process has, by address."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    found = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors + gradients]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def batch(number: int, length: int) -> dict[str, np.ndarray]:
    """One sequence."""
    tokens = np.random.default_rng(number).integers(0, VOCAB, (1, length))
    return {"tokens": tokens, "targets": tokens[:, ::-1].copy()}


def held(rank: int, config: Config, world: int, micro_batches: int) -> dict[str, Any]:
    """Bytes on this rank: all of them inside the last micro-batch's forward pass, and some by kind."""
    before = storages()
    engine = make_engine(config, rank, world)
    seen: dict[str, Any] = {"together": 0}

    def look(*_: Any) -> None:
        now = storages()
        seen["together"] = sum(size for address, size in now.items() if before.get(address) != size)

    engine.step(
        [batch(i, config.data.sequence_length) for i in range(micro_batches)], 1, 1e-3
    )  # the optimizer's state is there after this
    if config.parallel.pipeline == 1:
        engine.chunks[0].model.blocks[str(LAYERS - 1)].attn.register_forward_pre_hook(look)
    engine.step([batch(i, config.data.sequence_length) for i in range(micro_batches)], 2, 1e-3)
    states = engine.optimizer.state.values()
    seen["weight"] = sum(p.master.untyped_storage().nbytes() for p in engine.parameters)
    seen["optimizer"] = sum(value.nbytes for state in states for value in state.values() if value.ndim)
    return seen


def config_of(precision: str = "fp32", **parallel: Any) -> Config:
    return config_for("gpt", **{**MODEL, "precision": precision, "parallel": ParallelConfig(**parallel)})


def kept(config: Config, ranks: int, narrow: int = 4) -> float:
    """Weights, moments, gradients, and what is gathered of blocks (at stage 3 two of them) and of the rest."""
    zero, p = config.parallel.zero, memory.of_stage(config.model, LAYERS, True, True, 1, ranks)
    gathered = LAYERS if zero < 3 else 2 if ranks > 1 else 1  # alone on its rank nothing is on its way
    return 12 * p.held + 4 * (p.whole if zero == 1 else p.held) + narrow * gathered * p.block + 4 * p.rest


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_holds_what_the_formulas_say(zero: int, ranks: int) -> None:
    """Within 5 %, everything together while the last micro-batch computes; by kind see `test_zero_memory`."""
    config = with_values(config_of(zero=zero), {"train.global_batch_size": 2 * ranks})
    for got in run_ranks(held, ranks, config, ranks, 2):
        assert got["together"] == pytest.approx(kept(config, ranks), rel=0.05)


@pytest.mark.parametrize("zero", [2, 3])
def test_low_precision_gathers_half(zero: int) -> None:
    """Blocks are gathered in bfloat16; what autocast copies lies in its cache, where no test can see it."""
    config = with_values(config_of("bf16", zero=zero), {"train.global_batch_size": 4})
    for got in run_ranks(held, 2, config, 2, 2):
        assert got["together"] == pytest.approx(kept(config, 2, narrow=2), rel=0.05)


LAYOUTS = [
    (4, {"tensor": 2, "zero": 2}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    (4, {"pipeline": 2, "zero": 1}),
    (2, {"pipeline": 2, "schedule": "zbv"}),
    (4, {"context": 2, "zero": 3}),
    (4, {"zero": 3, "replicate": 2}),
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_layouts_hold_what_is_predicted(world: int, parallel: dict[str, Any]) -> None:
    """Weights and optimizer of every rank, stage by stage."""
    config = with_values(
        config_of(**parallel),
        {
            "model.max_positions": 4,
            "data.sequence_length": 4,
            "train.micro_batch_size": 1,
            "train.global_batch_size": 8,
        },
    )
    mesh = build_mesh(config.parallel, world)
    ranks = memory.predict(config, mesh, "fp32", 8 // mesh.data_ranks)
    for rank, got in enumerate(run_ranks(held, world, config, world, 8 // mesh.data_ranks)):
        expected = ranks[mesh.coordinates(rank)["pipeline"]].state
        assert got["weight"] == pytest.approx(expected.weight, rel=0.01)
        assert got["optimizer"] == pytest.approx(expected.optimizer, rel=0.01)
