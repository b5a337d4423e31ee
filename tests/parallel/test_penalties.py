"""Penalties of the weights: the gradient of the objective that they are, and under every layout that of one process."""

import functools

import pytest
import torch

from disttrain.config.checks import validate
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.parallel.penalties import add_gradients
from tests.chosen import chosen
from tests.parallel.test_data_parallel import make_engine
from tests.parallel.test_layouts import LAYOUTS, advance, config_of, micro_batches
from tests.ranks import disagreeing, gathered, run_ranks

L1, L2 = 3e-3, 5e-2
PENALISED = {"train.l1_penalty": L1, "train.l2_penalty": L2}


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    losses = advance(engine, range(1, 4))
    return {"losses": losses, "apart": disagreeing(engine, "weight"), "weights": gathered(engine, "weight")}


@functools.cache
def alone_trained() -> dict:
    return run_ranks(train, 1, config_of("one process", "gpt", **PENALISED)[1], 1)[0]


@pytest.mark.parametrize("name", chosen([n for n in LAYOUTS if n != "one process"], 3))
def test_every_layout_equals_one_process(name: str) -> None:
    world, config = config_of(name, "gpt", **PENALISED)
    alone, found = alone_trained(), run_ranks(train, world, config, world)[0]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert found["apart"] == []
    for parameter, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=1e-10, atol=1e-10, msg=parameter)


def compare_with_autograd(rank: int, config: Config, scale: float) -> None:
    engine = make_engine(config, rank, 1)
    parameters = {p.shard.name: p.parameter for p in engine.parameters}
    matrices = [p for p in parameters.values() if p.ndim > 1]
    with torch.no_grad():
        matrices[1][0] = 0  # where the subgradient is chosen
    objective = sum(L1 * p.abs().sum() + L2 / 2 * p.square().sum() for p in matrices)
    expected = dict(zip(map(id, matrices), torch.autograd.grad(objective, matrices), strict=True))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    unreached = next(iter(parameters.values()))
    unreached.grad = None
    add_gradients(engine.parameters, L1, L2, scale)
    for name, parameter in parameters.items():
        if parameter is unreached:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        more = scale * expected[id(parameter)] if id(parameter) in expected else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, 1 + more, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_they_are_the_gradient_of_the_objective(scale: float) -> None:
    """Matrices and embeddings only; a parameter that the loss does not reach stays without."""
    run_ranks(compare_with_autograd, 1, config_of("one process", "gpt")[1], scale)


def compare_with_a_plain_loop(rank: int) -> None:
    """The engine's clipped step is the step of one who adds the penalty to the loss: the norm is that of the objective."""
    config = config_of("one process", "gpt")[1]
    ours, plain = make_engine(with_values(config, PENALISED), rank, 1), make_engine(config, rank, 1)
    seen: list[float] = []

    def descend(moment: str) -> None:
        if moment == "reduced":
            parameters = [p.parameter for p in plain.parameters]
            penalty = sum(L1 * p.abs().sum() + L2 / 2 * p.square().sum()
                          for p in parameters if p.ndim > 1)  # fmt: skip
            penalty.backward()
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))

    plain.watch = descend
    for engine in (ours, plain):
        advance(engine, range(1, 3))
    assert len(seen) == 2 and min(seen) > 0.5, "clipping has nothing to do"
    for one, other in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one.master, other.master, rtol=1e-10, atol=1e-12)


def test_steps_are_those_of_one_who_adds_the_penalty_to_the_loss() -> None:
    run_ranks(compare_with_a_plain_loop, 1)


def fp16(rank: int, config: Config) -> list[float]:
    engine = make_engine(config, rank, 1)
    assert engine.scale.value > 1 or config.precision == "fp64"
    batches = [micro_batches(engine, step) for step in range(1, 4)]
    return [float(engine.step(batch, step, 1e-3).grad_norm) for step, batch in enumerate(batches, 1)]


def test_the_loss_scale_scales_the_penalties_too() -> None:
    """fp16's norm of the penalised gradient is that of fp64, which has no scale."""
    exact, scaled = (
        run_ranks(fp16, 1, config_of("one process", "gpt", **PENALISED, precision=precision)[1])[0]
        for precision in ("fp64", "fp16")
    )
    assert scaled == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(("engine", "refused"), [("native", 0), ("horovod", 0), ("deepspeed", 2)])
def test_an_engine_that_cannot_add_them_refuses_them(engine: str, refused: int) -> None:
    values = {"engine": engine, "precision": "fp32"}
    problems = validate(config_of("one process", "gpt", **PENALISED, **values)[1], 1)
    assert [p.settings[1].partition("=")[0] for p in problems] == list(PENALISED)[:refused]
