"""A model of the user's own trains under every axis as it does on one process; what is wrong with one is told first."""

from pathlib import Path

import pytest
import torch

from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.parallel import own_model
from tests.parallel.test_data_parallel import config_for, make_engine
from tests.parallel.test_layouts import BASE, advance
from tests.ranks import gathered, run_ranks

SOURCE = Path(__file__).resolve().parent.parent / "models" / "llama.py"


def own(**values) -> Config:
    return config_for("gpt", **{**BASE, "model.dropout": 0.0, "model.source": f"{SOURCE}:Llama", **values})


def train(rank: int, config: Config, world: int) -> tuple:
    engine = make_engine(config, rank, world)
    gradients = []
    engine.watch = lambda moment: gradients.append(gathered(engine, "gradient")) if moment == "reduced" else None
    return advance(engine, range(1, 4)), gradients[0], gathered(engine, "weight")


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.zero": 2}),
        (2, {"parallel.context": 2, "parallel.recompute": "selective"}),
        (8, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1, "train.micro_batch_size": 2}),
        (2, {"parallel.zero": 3, "parallel.recompute": "full"}),
    ],
)
def test_equals_one_process(world: int, layout: dict) -> None:
    losses, gradients, weights = run_ranks(train, 1, own(), 1)[0]
    assert len(weights) == 4 * 7 + 2
    found = run_ranks(train, world, own(**layout), world)[0]
    assert found[0] == pytest.approx(losses, rel=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)
    for name, weight in weights.items():
        torch.testing.assert_close(found[2][name], weight, rtol=1e-9, atol=1e-10)


def test_what_it_costs_is_counted() -> None:
    model = own().model
    parameters, flops = own_model.measure(model, 16)
    h, f, v, layers = model.hidden_size, model.ffn_hidden_size, model.vocab_size, model.layers
    assert f is not None and v is not None
    assert parameters == v * h + h + layers * (4 * h * h + 3 * h * f + 2 * h)
    assert flops == 2 * 16 * (layers * (4 * h * h + 3 * h * f) + v * h) + layers * 4 * 16 * 16 * h


WRONG = {
    "no file": ("nowhere.py:Model", {}, "no such class"),
    "no class": ("{file}:Nothing", {}, "no such class"),
    "no GPT": ("{file}:Plain", {}, "does not extend"),
    "broken": ("{file}:Broken", {}, "ZeroDivisionError"),
    "blocks": ("{file}:Empty", {}, "not one for each layer"),
    "no role": ("{file}:NoRole", {"parallel.tensor": 2}, ""),
    "no attend": ("{file}:NoAttend", {"parallel.context": 2}, "attend"),
}
CLASSES = """
from torch import nn
from disttrain import models

class Plain(nn.Module): ...

class Broken(models.GPT):
    def __init__(self, config):
        1 / 0

class Empty(models.GPT):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleDict({})

class NoRole(models.GPT):
    tensor_plan = {}

class NoAttend(models.GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks.values():
            block.attn = nn.Identity()
"""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_the_run(name: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(CLASSES)
    source, layout, message = WRONG[name]
    (problem,) = own_model.problems(with_values(own(**layout), {"model.source": source.format(file=file)}))
    assert message in problem.message
    assert any("model.source" in setting for setting in problem.settings)
    assert own_model.problems(own(**layout)) == []
