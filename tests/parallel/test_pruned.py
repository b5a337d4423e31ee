"""Pruning while training: every layout has one process's zeros, they stay through a resume, and rounding is layout-free."""

import functools
from pathlib import Path

import pytest
import torch

from disttrain.config.schema import Config
from disttrain.config.smaller import PruningConfig, QuantizationConfig
from disttrain.sparsity import prunable
from tests.chosen import chosen
from tests.parallel.test_data_parallel import make_engine
from tests.parallel.test_layouts import LAYOUTS, advance, config_of, resume, save
from tests.ranks import disagreeing, gathered, run_ranks

MORE = {
    "data": (2, {}),
    "tensor 4": (4, {"parallel.tensor": 4}),
    "zero 1": (2, {"parallel.zero": 1}),
    "zero 3": (4, {"parallel.zero": 3}),
    "pipeline": (2, {"parallel.pipeline": 2}),
}
GRADUAL = PruningConfig(method="magnitude", sparsity=0.6, begin_step=1, end_step=4, every=1)


def settings(name: str, pruning: PruningConfig = GRADUAL, **values: object) -> tuple[int, Config]:
    world, layout = {**MORE, **LAYOUTS}[name]
    pipelined = {"train.micro_batch_size": 2} if "parallel.pipeline" in layout else {}
    return world, config_of("one process", "gpt", pruning=pruning, **layout, **pipelined, **values)[1]


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    losses = advance(engine, range(1, 6))
    return {"losses": losses, "apart": disagreeing(engine, "weight"), "weights": gathered(engine, "weight")}


@functools.cache
def alone_trained(scope: str, embeddings: bool) -> dict:
    pruning = GRADUAL.model_copy(update={"scope": scope, "embeddings": embeddings})
    return run_ranks(train, 1, settings("one process", pruning)[1], 1)[0]


CASES = [
    (name, scope) for name in (*MORE, *(n for n in LAYOUTS if n != "one process")) for scope in ("global", "matrix")
]


@pytest.mark.parametrize("name, scope", chosen(CASES, 5))
def test_every_layout_has_the_zeros_of_one_process(name: str, scope: str) -> None:
    embeddings = scope == "global"
    alone = alone_trained(scope, embeddings)
    pruning = GRADUAL.model_copy(update={"scope": scope, "embeddings": embeddings})
    world, config = settings(name, pruning)
    found = run_ranks(train, world, config, world)[0]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert found["apart"] == []
    for parameter, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=1e-10, atol=1e-10, msg=parameter)
        assert torch.equal(found["weights"][parameter] == 0, weight == 0), parameter


@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_the_share_of_zeros_is_the_one_asked_for(scope: str) -> None:
    weights = alone_trained(scope, scope == "global")["weights"]
    matrices = {n: w for n, w in weights.items() if prunable(n, w.shape, scope == "global")}
    groups = [list(matrices.values())] if scope == "global" else [[w] for w in matrices.values()]
    for group in groups:
        flat = torch.cat([w.flatten() for w in group])
        assert int((flat == 0).sum()) == round(0.6 * flat.numel())
    assert scope == "global" or not (weights["embed.tokens.weight"] == 0).any()


def test_zeros_stay_through_a_resume_under_another_layout(tmp_path: Path) -> None:
    """Saved at step 2, pruned on to step 4 here and there; and kept by a run that prunes no further."""
    world, config = settings("tensor x pipeline x zero 1")
    losses, weights = run_ranks(save, world, config, world, tmp_path)[0]
    for name in ("one process", "zero 3"):
        world, config = settings(name)
        found, loaded = run_ranks(resume, world, config, world, tmp_path / "step_00000002")[0]
        assert found == pytest.approx(losses, rel=1e-10), name
        for parameter, weight in weights.items():
            assert torch.equal(loaded[parameter] == 0, weight == 0), f"{name}: {parameter}"
    kept = settings("data", PruningConfig(method="keep"))[1]
    _, loaded = run_ranks(resume, 2, kept, 2, tmp_path / "step_00000002")[0]
    free = settings("data", PruningConfig())[1]
    _, grown = run_ranks(resume, 2, free, 2, tmp_path / "step_00000002")[0]
    name = "blocks.0.mlp.up.weight"
    share = [float((w[name] == 0).double().mean()) for w in (loaded, grown, weights)]
    assert share[1] == 0 < share[0] < share[2]


ROUNDED = ["data", "zero 3", "context x pipeline x zero 2"]


@pytest.mark.parametrize("name", chosen(ROUNDED, 2))
def test_rounding_in_training_is_the_same_under_every_layout(name: str) -> None:
    """In float64, where no value is at the border of two steps by chance of an order of sums."""
    aware = {"quantization": QuantizationConfig(aware=True)}
    alone = run_ranks(train, 1, settings("one process", PruningConfig(), **aware)[1], 1)[0]
    world, config = settings(name, PruningConfig(), **aware)
    found = run_ranks(train, world, config, world)[0]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    for parameter, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=1e-9, atol=1e-10, msg=parameter)
