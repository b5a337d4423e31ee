"""Adversarial training takes two forward passes and a gradient in between: it trains as on one process all the same."""

import functools
import math
from pathlib import Path

import pytest
import torch

from disttrain.config.schema import Config
from tests.chosen import chosen
from tests.parallel.test_data_parallel import VOCAB, config_for, make_engine
from tests.parallel.test_layouts import BASE, advance
from tests.ranks import disagreeing, gathered, run_ranks

SOURCE = Path(__file__).resolve().parent.parent / "models" / "adversary.py"

LAYOUTS: dict[str, tuple[int, dict]] = {
    "data, accumulated": (2, {"train.micro_batch_size": 2}),
    "zero 3, accumulated": (2, {"parallel.zero": 3, "train.micro_batch_size": 2}),
    "tensor": (2, {"parallel.tensor": 2}),
    "zero 1": (2, {"parallel.zero": 1}),
    "zero 2": (2, {"parallel.zero": 2}),
    "recomputed": (2, {"parallel.recompute": "full"}),
}


def config_of(**values) -> Config:
    return config_for("gpt", **{**BASE, "model.layers": 2, "model.source": f"{SOURCE}:Adversary", **values})


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    losses = advance(engine, range(1, 4))
    return {"losses": losses, "apart": disagreeing(engine, "weight"), "weights": gathered(engine, "weight")}


@functools.cache
def alone_trained() -> dict:
    return run_ranks(train, 1, config_of(), 1)[0]


@pytest.mark.parametrize("name", chosen(LAYOUTS, 3))
def test_equals_one_process(name: str) -> None:
    world, layout = LAYOUTS[name]
    alone, found = alone_trained(), run_ranks(train, world, config_of(**layout), world)[0]
    assert min(alone["losses"]) > 1.5 * math.log(VOCAB), "there are two losses"
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert found["apart"] == []
    for parameter, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=1e-10, atol=1e-10, msg=parameter)
