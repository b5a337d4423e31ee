"""Losses of classification against hand-worked numbers, loops in float64, and torch's own."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.cross_entropy import IGNORED
from disttrain.models.layers import LossSum
from disttrain.models.losses import (
    cross_entropy,
    focal,
    ghm,
    ghm_counts,
    ghm_density,
    log_odds,
    squared_error,
)

N, C = 24, 5
DENSITY = torch.tensor([3.0, 0.0, 5.5, 12.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor, Tensor], LossSum]] = {
    "cross-entropy": cross_entropy,
    "focal": focal,
    "focal, weak": lambda x, y: focal(x, y, 0.5),
    "focal, plain": lambda x, y: focal(x, y, 0.0),
    "ghm": lambda x, y: ghm(x, y, DENSITY),
}


def examples(binary: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((N,) if binary else (N, C), generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2 if binary else C, (N,), generator=generator)
    targets[::5] = IGNORED
    return logits.to(dtype).requires_grad_(), targets


def probabilities(logits: Tensor, targets: Tensor) -> list[float]:
    """p of the target for each row that counts, without any care for rounding."""
    found = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target != IGNORED:
            row = row if isinstance(row, list) else [0.0, row]
            found.append(math.exp(row[target]) / sum(map(math.exp, row)))
    return found


def test_focal_by_hand():
    """p = 0.8: -(0.2)^2 log 0.8; p = 0.25 of class 1 with alpha = 0.25: -0.25 (0.75)^2 log 0.25."""
    logits = torch.tensor([math.log(4), 0.0], dtype=torch.float64)
    assert focal(logits[None], torch.tensor([0])).sum.item() == pytest.approx(0.04 * 0.22314355131420976, rel=1e-12)
    binary = torch.tensor([-math.log(3)], dtype=torch.float64)
    found = focal(binary, torch.tensor([1]), alpha=(0.75, 0.25))
    assert found.sum.item() == pytest.approx(0.25 * 0.5625 * 1.3862943611198906, rel=1e-12)


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_written_out(binary: bool, gamma: float):
    logits, targets = examples(binary)
    alpha = (0.75, 0.25) if binary else (1.0, 0.5, 2.0, 0.0, 3.0)
    kept = targets[targets != IGNORED].tolist()
    ps = probabilities(logits, targets)
    expected = sum(-alpha[t] * (1 - p) ** gamma * math.log(p) for p, t in zip(ps, kept, strict=True))
    found = focal(logits, targets, gamma, alpha)
    assert found.sum.item() == pytest.approx(expected, rel=1e-10) and found.count == len(kept)


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["cross-entropy", "focal, plain"])
def test_without_more_they_are_torchs_cross_entropy(binary: bool, name: str):
    logits, targets = examples(binary)
    counts = targets != IGNORED
    if binary:
        expected = F.binary_cross_entropy_with_logits(logits[counts], targets[counts].double(), reduction="sum")
    else:
        expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(LOSSES[name](logits, targets).sum, expected, rtol=1e-12, atol=0)


def test_smoothing_is_torchs():
    logits, targets = examples(binary=False)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy(logits, targets, 0.2).sum, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="two columns"):
        cross_entropy(logits[:, 0], targets, 0.2)


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up(name: str, binary: bool):
    """Sums, counts and gradients; ignored rows have none."""
    logits, targets = examples(binary)
    whole = LOSSES[name](logits, targets)
    assert whole.count == (targets != IGNORED).sum() and whole.sum.dtype == torch.float64
    parts = [LOSSES[name](x, y) for x, y in zip(logits.split(7), targets.split(7), strict=True)]
    torch.testing.assert_close(torch.stack([part.sum for part in parts]).sum(), whole.sum, rtol=1e-12, atol=0)
    assert sum(part.count for part in parts) == whole.count
    (expected,) = torch.autograd.grad(whole.sum, logits)
    (found,) = torch.autograd.grad([part.sum for part in parts], logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert expected[targets == IGNORED].count_nonzero() == 0


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative(name: str, binary: bool):
    logits, targets = (x[:8] for x in examples(binary))
    logits = logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, targets).sum, (logits,))


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32s_accuracy(name: str, binary: bool, dtype: torch.dtype):
    logits, targets = examples(binary, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](logits, targets).sum
    expected = LOSSES[name](logits.double(), targets).sum
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_certain_predictions_have_finite_losses_and_gradients(name: str):
    for logits, targets in [
        (torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]]), torch.tensor([0, 0])),
        (torch.tensor([200.0, -200.0]), torch.tensor([1, 1])),
    ]:
        logits.requires_grad_()
        loss = LOSSES[name](logits, targets).sum
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all(), logits
    assert LOSSES[name](torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).sum == 0


def test_what_is_left_of_one_keeps_its_digits():
    """1 - p = e^-60 to full precision, where 1 - p by subtraction would be 0."""
    odds = log_odds(torch.tensor([[60.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert odds.wrong.item() == pytest.approx(-60, rel=1e-12)
    assert odds.right.item() == pytest.approx(-math.exp(-60), rel=1e-10)


def test_ghm_by_hand():
    """g = 0.2, 0.2, 0.7, 0.9 in 4 regions: counts 2, 0, 1, 1, so that the pair weighs 4 / (2 * 4) and the others 1."""
    odds = [4.0, 4.0, 3 / 7, 1 / 9]
    logits = torch.tensor([[math.log(o), 0.0] for o in odds], dtype=torch.float64)
    targets = torch.zeros(4, dtype=torch.int64)
    counts = ghm_counts(logits, targets, 4)
    assert counts.tolist() == [2, 0, 1, 1]
    found = ghm(logits, targets, ghm_density(counts, None))
    ps = [o / (1 + o) for o in odds]
    expected = -0.5 * 2 * math.log(ps[0]) - math.log(ps[2]) - math.log(ps[3])
    assert found.sum.item() == pytest.approx(expected, rel=1e-12) and found.count == 4
    assert ghm_counts(torch.tensor([[-900.0, 0.0]]), torch.tensor([0]), 4).tolist() == [0, 0, 0, 1]


def test_examples_that_spread_evenly_weigh_one():
    g = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    logits = torch.log((1 - g) / g)
    targets = torch.ones(10, dtype=torch.int64)
    counts = ghm_counts(logits, targets, 10)
    assert counts.tolist() == [1] * 10
    expected = cross_entropy(logits, targets).sum
    torch.testing.assert_close(ghm(logits, targets, counts.double()).sum, expected, rtol=1e-12, atol=0)


def test_density_averages_over_steps_and_adds_over_ranks():
    logits, targets = examples(binary=False)
    parts = [ghm_counts(x, y) for x, y in zip(logits.split(7), targets.split(7), strict=True)]
    whole = ghm_counts(logits, targets)
    assert torch.equal(torch.stack(parts).sum(0), whole) and whole.sum() == (targets != IGNORED).sum()
    first = ghm_density(parts[0], None, 0.75, reduce=lambda counts: counts + sum(parts[1:]))
    assert torch.equal(first, whole.double())
    second = ghm_density(whole.flip(0), first, 0.75)
    torch.testing.assert_close(second, 0.75 * whole.double() + 0.25 * whole.flip(0).double())
    with pytest.raises(ValueError, match="momentum"):
        ghm_density(whole, first, 1.0)


def test_an_unseen_region_counts_as_one_example():
    logits, targets = torch.tensor([math.log(2 / 3)], dtype=torch.float64), torch.tensor([1])
    found = ghm(logits, targets, torch.tensor([0.0, 6.0, 0.0, 0.0]))
    assert found.sum.item() == pytest.approx(6 / (1 * 4) * -math.log(0.4), rel=1e-12)


def test_squared_error():
    predictions = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.5, 4.0, -1.0], dtype=torch.float64)
    assert squared_error(predictions, targets) == LossSum(torch.tensor(4.25, dtype=torch.float64), torch.tensor(3))
    some = squared_error(predictions, targets, torch.tensor([True, False, True]))
    assert some == LossSum(torch.tensor(0.25, dtype=torch.float64), torch.tensor(2))
    assert torch.autograd.gradcheck(lambda x: squared_error(x, targets).sum, (predictions,))
    half = squared_error(predictions.bfloat16(), targets.bfloat16())
    assert half.sum.dtype == torch.float32 and half.sum == 4.25
    with pytest.raises(ValueError, match="differ in shape"):
        squared_error(predictions[:, None], targets)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: focal(x, y, gamma=-1),
        lambda x, y: focal(x, y, alpha=(1.0, 2.0)),
        lambda x, y: focal(x[:, :1], y),
        lambda x, y: log_odds(x[None], y),
    ],
)
def test_refusals(call: Callable):
    with pytest.raises(ValueError):
        call(*examples(binary=False))
