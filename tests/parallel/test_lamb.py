"""LAMB equals one process under every layout: its norms are those of whole parameters."""

import functools
from pathlib import Path

import pytest
import torch

from disttrain.config.schema import Config
from disttrain.verify.layouts import parse
from tests.chosen import chosen
from tests.parallel.test_data_parallel import make_engine
from tests.parallel.test_layouts import LAYOUTS, advance, config_of, resume, save
from tests.ranks import disagreeing, gathered, run_ranks
from tests.verify.small import proof_for

MORE = {
    "data": (2, {}),
    "data, accumulated": (2, {"train.micro_batch_size": 1}),
    "tensor": (2, {"parallel.tensor": 2}),
    "tensor 4": (4, {"parallel.tensor": 4}),
    "pipeline x tensor 4": (8, {"parallel.pipeline": 2, "parallel.tensor": 4}),
    "zero 1": (2, {"parallel.zero": 1}),
    "zero 2": (2, {"parallel.zero": 2, "train.micro_batch_size": 1}),
    "zero 3": (4, {"parallel.zero": 3}),
}


def settings(name: str) -> tuple[int, Config]:
    world, layout = {**MORE, **LAYOUTS}[name]
    pipelined = {"train.micro_batch_size": 2} if "parallel.pipeline" in layout else {}
    return world, config_of("one process", "gpt", **{"optim.name": "lamb", **layout, **pipelined})[1]


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    losses = advance(engine, range(1, 5))
    return {"losses": losses, "apart": disagreeing(engine, "weight"), "weights": gathered(engine, "weight")}


@functools.cache
def alone_trained() -> dict:
    return run_ranks(train, 1, settings("one process")[1], 1)[0]


@pytest.mark.parametrize("name", chosen([*MORE, *(n for n in LAYOUTS if n != "one process")], 3))
def test_every_layout_equals_one_process(name: str) -> None:
    world, config = settings(name)
    alone = alone_trained()
    found = run_ranks(train, world, config, world)[0]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert found["apart"] == []
    for parameter, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=1e-10, atol=1e-10, msg=parameter)


def test_a_checkpoint_moves_between_layouts(tmp_path: Path) -> None:
    world, config = settings("tensor x pipeline x zero 1")
    losses, weights = run_ranks(save, world, config, world, tmp_path)[0]
    for name in chosen(["zero 3", "tensor x pipeline x zero 1", "one process"], 2):
        world, config = settings(name)
        found, loaded = run_ranks(resume, world, config, world, tmp_path / "step_00000002")[0]
        assert found == pytest.approx(losses, rel=1e-10), name
        for parameter, weight in weights.items():
            torch.testing.assert_close(loaded[parameter], weight, rtol=1e-9, atol=1e-10, msg=f"{name}: {parameter}")


def test_verify_holds_it_to_one_process() -> None:
    with proof_for("gpt", "fp64", **{"optim.name": "lamb"}) as proof:
        verdict = proof.verify(parse("tp2.sp.dp2.zero2.mb2 on 4"))
        assert verdict.equal, verdict.failures[:3]
        assert len(verdict.worst) == 13
