"""Padding and ignored targets are in no count and no loss, of a GPT and of a BERT, on one rank and on two."""

from typing import Any

import numpy as np
import pytest

from tests.parallel.test_data_parallel import BATCH, config_for, global_batch, make_engine
from tests.ranks import run_ranks

Batch = dict[str, np.ndarray]


def one_step(rank: int, family: str, world: int, batch: Batch) -> dict[str, Any]:
    engine = make_engine(config_for(family), rank, world)
    share = BATCH // world
    mine = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
    micro_batches = [{key: value[i : i + 2] for key, value in mine.items()} for i in range(0, share, 2)]
    result = engine.step(micro_batches, 1, learning_rate=1e-2)
    return {
        "tokens": int(result.tokens),
        "padding": result.positions - int(result.tokens),
        "counts": {name: int(loss.count) for name, loss in result.losses.items()},
        "losses": {name: float(loss.sum / loss.count) for name, loss in result.losses.items()},
        "norm": float(result.grad_norm),
    }


def spoiled(batch: Batch) -> Batch:
    """Other tokens where there is padding."""
    tokens = np.where(batch["attention_mask"], batch["tokens"], (batch["tokens"] + 7) % 61)
    return {**batch, "tokens": tokens}


@pytest.mark.parametrize("world", [1, 2])
def test_padding_of_a_bert(world: int) -> None:
    batch = global_batch("bert", 1)
    real, asked = int(batch["attention_mask"].sum()), int((batch["targets"] != -100).sum())
    assert asked < real < batch["tokens"].size
    found = run_ranks(one_step, world, "bert", world, batch)
    for rank in found:
        assert (rank["tokens"], rank["padding"]) == (real, batch["tokens"].size - real)
        assert rank["counts"] == {"mlm": asked, "nsp": BATCH}
    (again, *_) = run_ranks(one_step, world, "bert", world, spoiled(batch))
    assert again["losses"] == pytest.approx(found[0]["losses"], rel=1e-12)
    assert again["norm"] == pytest.approx(found[0]["norm"], rel=1e-12)


@pytest.mark.parametrize("world", [1, 2])
def test_ignored_targets_of_a_gpt(world: int) -> None:
    """They are read, so they count as tokens, and are no targets: the loss is that of the others alone."""
    batch = global_batch("gpt", 1)
    asked = int((batch["targets"] != -100).sum())
    (found, *_) = run_ranks(one_step, world, "gpt", world, batch)
    assert (found["tokens"], found["padding"], found["counts"]) == (batch["tokens"].size, 0, {"lm": asked})
    half = {**batch, "targets": np.where(np.arange(BATCH)[:, None] < BATCH // 2, batch["targets"], -100)}
    rest = {**batch, "targets": np.where(np.arange(BATCH)[:, None] < BATCH // 2, -100, batch["targets"])}
    parts = [run_ranks(one_step, world, "gpt", world, part)[0] for part in (half, rest)]
    sums = [part["losses"]["lm"] * part["counts"]["lm"] for part in parts]
    assert sum(part["counts"]["lm"] for part in parts) == asked
    assert sum(sums) / asked == pytest.approx(found["losses"]["lm"], rel=1e-12)
