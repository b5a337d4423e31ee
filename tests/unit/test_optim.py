"""Learning-rate schedules by hand-worked values, and which parameters decay."""

import math
from typing import Literal

import pytest
import torch
from torch import nn

from disttrain.config.schema import GradientCodec, OptimConfig
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


def gradients_of(step: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1**i for i, p in enumerate(parameters)]


def trained(
    steps: int, warmup: int, config: OptimConfig, codec: GradientCodec
) -> tuple[list[nn.Parameter], list[dict]]:
    """A matrix, a matrix that is zero, and a vector; of the first a row never has a gradient before `warmup`."""
    torch.manual_seed(0)
    start = [torch.randn(6, 5), torch.zeros(4, 3), torch.randn(5)]
    parameters = [nn.Parameter(x.double()) for x in start]
    optimizer = build_optimizer(config, list(zip("abc", parameters, strict=True)), codec)
    for step in range(1, steps + 1):
        for p, gradient in zip(parameters, gradients_of(step, parameters), strict=True):
            p.grad = gradient
        if step <= warmup and parameters[0].grad is not None:
            parameters[0].grad[0] = 0
        if codec != "none":
            optimizer.frozen = step > warmup  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return parameters, [optimizer.state[p] for p in parameters]


def written_out(steps: int, warmup: int, config: OptimConfig, lamb: bool, one_bit: bool) -> list[torch.Tensor]:
    """The same by the papers' formulas, one parameter after the other."""
    torch.manual_seed(0)
    start = [torch.randn(6, 5), torch.zeros(4, 3), torch.randn(5)]
    weights = [x.double() for x in start]
    parameters = [nn.Parameter(w) for w in weights]
    b1, b2, eps = config.beta1, config.beta2, config.epsilon
    for i, w in enumerate(weights):
        m, v, fresh = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
        average, factor = None, 1.0
        decay = config.weight_decay if w.ndim > 1 else 0.0
        for t in range(1, steps + 1):
            frozen = one_bit and t > warmup
            g = gradients_of(t, parameters)[i]
            if i == 0 and t <= warmup:
                g[0] = 0
            m = b1 * m + (1 - b1) * g
            v = v if frozen else b2 * v + (1 - b2) * g**2
            fresh = b2 * fresh + (1 - b2) * g**2
            seen = warmup if frozen else t
            below = (v / (1 - b2**seen)).sqrt() + eps
            direction = (m / (1 - b1**t)) / below * (v > 0)
            update = direction + decay * w
            coefficient = 1.0
            if lamb and w.ndim > 1 and not frozen:
                norms = float(w.norm()), float(update.norm())
                coefficient = norms[0] / norms[1] if min(norms) > 0 else 1.0
                if one_bit:
                    coefficient = min(max(coefficient, 0.01), 10.0)
                    average = coefficient if average is None else 0.9 * average + 0.1 * coefficient
            elif lamb and w.ndim > 1:
                largest = float((below / ((fresh / (1 - b2**t)).sqrt() + eps)).max())
                factor = min(max(min(max(largest, 0.5), 4.0), 0.9 * factor), 1.1 * factor)
                assert average is not None
                coefficient = average * factor
            w -= config.lr * coefficient * update
    return weights


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "codec"), [
    ("adamw", "none"), ("lamb", "none"), ("adamw", "onebit_adam"), ("lamb", "onebit_lamb"),
])  # fmt: skip
def test_updates_are_the_papers(name: Literal["adamw", "lamb"], codec: GradientCodec, weight_decay: float) -> None:
    config = OptimConfig(name=name, lr=0.05, beta2=0.9, weight_decay=weight_decay)
    parameters, states = trained(12, 5, config, codec)
    expected = written_out(12, 5, config, name == "lamb", codec != "none")
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)
    assert all(set(state) >= {"step", "exp_avg", "exp_avg_sq"} for state in states)


def test_frozen_second_moments_do_not_change_and_thaw() -> None:
    for name, codec in (("adamw", "onebit_adam"), ("lamb", "onebit_lamb")):
        config = OptimConfig(name=name, lr=0.05)  # pyright: ignore[reportArgumentType]
        (_, before), (_, after) = trained(5, 5, config, codec), trained(9, 5, config, codec)  # pyright: ignore
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
            assert not torch.equal(one["exp_avg"], other["exp_avg"])
            assert float(other["frozen_step"]) == 5
        _, thawed = trained(9, 9, config, codec)  # pyright: ignore[reportArgumentType]
        assert all("frozen_step" not in state and "exp_avg_sq_fresh" not in state for state in thawed)


def test_nothing_was_learned_at_all() -> None:
    """All steps of the warm-up were skipped: no direction, but no NaN either."""
    for name, codec in (("adamw", "onebit_adam"), ("lamb", "onebit_lamb")):
        parameters, _ = trained(2, 0, OptimConfig(name=name, weight_decay=0.0), codec)  # pyright: ignore
        assert all(p.isfinite().all() for p in parameters)
