"""The loss scaler as a table of overflow patterns, and what auto chooses."""

import pytest
import torch

from disttrain import precision
from disttrain.config.schema import LossScaleConfig
from disttrain.precision import LossScale


def play(pattern: str, initial: float = 16.0, interval: int = 3, minimum: float = 1.0) -> list[float]:
    """Scale after each step; x = overflow, . = good."""
    scale = LossScale.start("fp16", LossScaleConfig(initial=initial, growth_interval=interval, minimum=minimum))
    values = []
    for step in pattern:
        scale = scale.after(step == "x")
        values.append(scale.value)
    return values


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("...", [16, 16, 32]),
        ("......", [16, 16, 32, 32, 32, 64]),
        ("x", [8]),
        ("xx..", [8, 4, 4, 4]),
        ("..x..", [16, 16, 8, 8, 8]),  # an overflow starts the count of good steps again
        ("..x...", [16, 16, 8, 8, 8, 16]),
        ("xxxx", [8, 4, 2, 1]),
    ],
)
def test_overflow_patterns(pattern: str, expected: list[float]) -> None:
    assert play(pattern) == expected


def test_overflow_at_the_smallest_scale_stops() -> None:
    with pytest.raises(FloatingPointError, match="smallest loss scale"):
        play("xxxxx")


def test_never_below_the_minimum() -> None:
    assert play("x", initial=3.0, minimum=2.0) == [2.0]


def test_equals_torch_grad_scaler() -> None:
    pattern = "..x....x.x......x..."
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = []
    for step in pattern:
        scaler.scale(parameter.sum()).backward()
        if step == "x":
            parameter.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        theirs.append(scaler.get_scale())
    assert play(pattern, minimum=0.001) == theirs


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_others_do_not_scale(name: str) -> None:
    scale = LossScale.start(name, LossScaleConfig())
    assert (scale.value, scale.dynamic, scale.after(True)) == (1.0, False, scale)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), ({"avx512f"}, "fp32"), (set(), "fp32")],
)
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, flags: set, expected: str) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    assert precision.choose("auto", "cpu") == expected
    assert precision.choose("fp16", "cpu") == "fp16"
