"""Differences: how large, where first, by what factor."""

import math

import pytest
import torch

from disttrain.verify.compare import Ledger, first_of
from disttrain.verify.proof import last_line
from disttrain.verify.tolerance import EXACT, ROUNDING, Exactly, Noise

A = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def test_errors_are_relative_to_the_largest_element() -> None:
    ledger = Ledger(Exactly())
    ledger.tensors("gradients", 1, {"a": A + torch.tensor([0.0, 0.4, 0.0])}, {"a": A}, {})
    (found,) = ledger.failures
    assert found.error == pytest.approx(0.4 / 4.004)  # 4 and a thousandth of the largest tensor
    assert (found.ours, found.expected) == (pytest.approx(-1.6), -2.0)
    assert found.ratio is None
    assert ledger.worst["gradients"] == found
    assert ledger.errors == {("gradients", 1, "a"): found.error}


@pytest.mark.parametrize("factor", [2.0, 0.5, 0.25, 1 / 3])
def test_one_factor_is_recognised(factor: float) -> None:
    ledger = Ledger(Exactly())
    ledger.tensors("gradients", 1, {"a": A * factor}, {"a": A}, {})
    assert ledger.failures[0].ratio == pytest.approx(factor)


def test_rounding_passes_and_cancelled_gradients_too() -> None:
    ledger = Ledger(Exactly())
    noise = torch.tensor([1e-17, -1e-17, 2e-17], dtype=torch.float64)
    ledger.tensors("gradients", 1, {"a": A * (1 + 1e-12), "key.bias": noise}, {"a": A, "key.bias": -noise}, {})
    assert not ledger.failures
    assert 0 < ledger.worst["gradients"].error < EXACT


def test_missing_strange_and_broken_tensors_fail() -> None:
    ledger = Ledger(Exactly())
    ours = {"b": A, "c": A[:2], "d": A * math.nan, "e": A * math.inf}
    ledger.tensors("weights", 1, ours, {"a": A, "c": A, "d": A, "e": A}, {})
    assert {d.name for d in ledger.failures} == {"a", "b", "c", "d", "e"}
    assert all(d.error == math.inf for d in ledger.failures)


def test_a_tied_name_may_be_missing_or_there_twice() -> None:
    tied = {"head.weight": "embed.weight"}
    ledger = Ledger(Exactly())
    ledger.tensors("weights", 1, {"embed.weight": A}, {"embed.weight": A, "head.weight": A}, tied)
    ledger.tensors("weights", 1, {"embed.weight": A, "head.weight": A}, {"embed.weight": A}, tied)
    assert not ledger.failures
    ledger.tensors("weights", 1, {"embed.weight": A, "head.weight": 2 * A}, {"embed.weight": A}, tied)
    assert [d.name for d in ledger.failures] == ["head.weight"]


def test_numbers_and_decisions() -> None:
    ledger = Ledger(Exactly())
    ledger.number("forward", 1, "lm", 2.0 + 1e-13, 2.0)
    ledger.number("grad_norm", 3, "norm", math.inf, math.nan)  # an overflow either way
    ledger.exact("skip", 3, "skipped", True, True)
    assert not ledger.failures
    ledger.number("grad_norm", 3, "norm", 1.0, math.inf)
    ledger.exact("skip", 3, "skipped", False, True, "on rank 1")
    ledger.exact("counts", 1, "tokens", None, 5)
    assert [d.name for d in ledger.failures] == ["norm", "skipped", "tokens"]
    assert ledger.failures[1].note == "on rank 1"


def test_the_first_difference_is_the_earliest_cause() -> None:
    ledger = Ledger(Exactly())
    for phase, step, name, ours in [
        ("weights", 1, "a", 1.5), ("gradients", 1, "a", 1.1), ("gradients", 1, "b", 1.2), ("forward", 2, "lm", 9.0),
        ("grad_norm", 1, "norm", 3.0), ("evaluation", 1, "lm", 4.0),
    ]:  # fmt: skip
        ledger.number(phase, step, name, ours, 1.0)
    assert [(d.phase, d.name) for d in first_of(ledger.failures)] == [("gradients", "b"), ("gradients", "a")]
    assert first_of([]) == []
    after = Ledger(Exactly())
    after.number("resume", 4, "a", 2.0, 1.0)
    after.number("evaluation", 4, "lm", 2.0, 1.0)
    after.number("weights", 4, "a", 2.0, 1.0)
    assert [d.phase for d in first_of(after.failures)] == ["weights"]  # what trains wrongly, evaluates wrongly


def test_a_label_keeps_the_phase_as_a_part() -> None:
    ledger = Ledger(Exactly())
    ledger.label = "resume"
    ledger.number("grad_norm", 5, "norm", 2.0, 1.0, "on rank 0")
    ledger.number("weights", 5, "a", 9.0, 1.0)
    found = ledger.failures[0]
    assert (found.phase, found.part, found.note) == ("resume", "grad_norm", "on rank 0")
    assert first_of(ledger.failures) == [found]
    ledger.number("weights", 4, "a", 2.0, 1.0)
    assert [d.step for d in first_of(ledger.failures)] == [4]


def test_noise_bounds() -> None:
    noise = Noise.of({("gradients", 1, "a"): 1e-3, ("gradients", 2, "a"): 2e-3, ("gradients", 1, "b"): 1e-6,
                      ("gradients", 1, "c"): 1e-4, ("forward", 1, "lm"): 1e-12, ("skip", 1, "skipped"): 0.0})  # fmt: skip
    assert noise.bound("gradients", 1, "a") == pytest.approx(8e-3)  # the noisiest step counts
    assert noise.bound("gradients", 1, "b") == pytest.approx(4e-4)  # the median of its phase
    assert noise.bound("forward", 1, "lm") == 4 * ROUNDING
    ledger = Ledger(noise)
    ledger.exact("skip", 1, "skipped", True, True)
    assert not ledger.failures
    assert ledger.worst["skip"].excess == 0
    ledger.exact("skip", 1, "skipped", False, True)
    assert ledger.failures


def test_noise_is_compared_by_root_mean_square() -> None:
    one = torch.tensor([0.0, 0.0, 0.3])
    ledger = Ledger(Noise({}, {}))
    ledger.tensors("gradients", 1, {"a": A + one}, {"a": A}, {})
    (found,) = ledger.failures
    assert found.error == pytest.approx(0.3 / math.sqrt(21) / 1.001)
    assert found.ours == pytest.approx(4.3)


def test_last_line() -> None:
    assert last_line("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_line('Traceback\n  File "x.py", line 3, in f\nAssertionError\n') == (
        'AssertionError in File "x.py", line 3, in f'
    )
