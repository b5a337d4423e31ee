"""Learning-rate schedules by hand-worked values, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from disttrain.config.schema import OptimConfig
from disttrain.optim import build_optimizer, learning_rate


def rates(steps: int = 10, **values) -> list[float]:
    config = OptimConfig(lr=1.0, **values)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "constant"}, [1] * 10),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "min_lr_ratio": 0.0}, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        (
            {"schedule": "linear", "min_lr_ratio": 0.5, "warmup_steps": 5},
            [0.2, 0.4, 0.6, 0.8, 1, 0.9, 0.8, 0.7, 0.6, 0.5],
        ),
        ({"schedule": "wsd", "min_lr_ratio": 0.0, "decay_fraction": 0.4}, [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "inverse_sqrt", "warmup_steps": 4}, [0.25, 0.5, 0.75] + [math.sqrt(4 / s) for s in range(4, 11)]),
    ],
)
def test_schedules(values: dict, expected: list[float]) -> None:
    assert rates(**values) == pytest.approx(expected, abs=1e-12)


def test_cosine_equals_torch() -> None:
    ours = rates(schedule="cosine", min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for rate in ours:
        optimizer.step()
        theirs.step()
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_whole_run_of_warm_up(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_steps=10)[-1] == 1.0


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.3), model.named_parameters())
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for _, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim == 2 else 0.0)


@pytest.mark.parametrize(
    ("implementation", "fused", "foreach"), [("auto", True, None), ("fused", True, None), ("foreach", False, True)]
)
def test_kernels_agree(implementation: str, fused: bool, foreach: bool | None) -> None:
    weights = []
    for kind in (implementation, "foreach"):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = build_optimizer(OptimConfig(implementation=kind), model.named_parameters())
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        weights.append(model.weight.detach())
        if kind == implementation:
            assert bool(optimizer.defaults["fused"]) == fused
            assert optimizer.defaults["foreach"] == foreach
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)
