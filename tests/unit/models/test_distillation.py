"""Distillation losses against torch's own, hand-worked cases, and their parts."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.cross_entropy import IGNORED
from disttrain.models.distillation import (
    Projections,
    attention_mse,
    distillation,
    features,
    hidden_mse,
    soft_cross_entropy,
    soft_targets,
    uniform_layers,
)
from disttrain.models.layers import LossSum

N, C, B, S, H, A = 10, 4, 3, 5, 6, 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> Tensor:
    found = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(9))
    found[[1, 6]] = IGNORED
    return found


def mask() -> Tensor:
    return torch.arange(S) < torch.tensor([5, 3, 1])[:, None]


def test_by_hand():
    """Teacher odds 9 : 1 at T = 1, so 3 : 1 at T = 2; a student of logits 0 loses log 2 either way."""
    teacher = torch.tensor([[math.log(9), 0.0]], dtype=torch.float64)
    soft = soft_targets([teacher], 2.0)
    torch.testing.assert_close(soft, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    student = torch.tensor([[2 * math.log(4), 0.0]], dtype=torch.float64)
    hard = -math.log(16 / 17)
    taught = -4 * (0.75 * math.log(0.8) + 0.25 * math.log(0.2))
    found = distillation(student, soft, torch.tensor([0]), weight=0.3, temperature=2.0)
    assert found.sum.item() == pytest.approx(0.7 * hard + 0.3 * taught, rel=1e-12) and found.count == 1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_torch(temperature: float):
    student, teacher, y = normal(0, N, C).requires_grad_(), normal(1, N, C), targets()
    soft = soft_targets([teacher], temperature)
    found = distillation(student, soft, y, 0.5, temperature, 0.1)
    counts = y != IGNORED
    hard = F.cross_entropy(student, y, reduction="sum", label_smoothing=0.1)
    scaled = student[counts] / temperature
    taught = temperature**2 * F.cross_entropy(scaled, (teacher[counts] / temperature).softmax(1), reduction="sum")
    torch.testing.assert_close(found.sum, 0.5 * hard + 0.5 * taught, rtol=1e-12, atol=0)
    assert found.count == 8

    (gradient,) = torch.autograd.grad(soft_cross_entropy(student, soft, temperature).sum, student)
    p = (student / temperature).softmax(1)
    torch.testing.assert_close(gradient, temperature * (p - soft), rtol=1e-10, atol=1e-12)
    divergence = temperature**2 * F.kl_div(p.log(), soft, reduction="sum")
    entropy = -(temperature**2) * torch.xlogy(soft, soft).sum()
    torch.testing.assert_close(soft_cross_entropy(student, soft, temperature).sum, divergence + entropy)


def test_ends_of_the_weight():
    student, y = normal(0, N, C), targets()
    soft = soft_targets([normal(1, N, C)])
    hard = distillation(student, soft, y, weight=0).sum
    torch.testing.assert_close(hard, F.cross_entropy(student, y, reduction="sum"))
    assert distillation(student, soft, None, weight=1).count == N
    torch.testing.assert_close(distillation(student, soft, None, weight=1).sum, soft_cross_entropy(student, soft).sum)


def test_several_teachers_are_averaged():
    one, two = normal(1, N, C), normal(2, N, C)
    both = soft_targets([one, two], 3.0)
    torch.testing.assert_close(both, ((one / 3).softmax(1) + (two / 3).softmax(1)) / 2)
    weighted = soft_targets([one, two], 3.0, [1.0, 3.0])
    torch.testing.assert_close(weighted, 0.25 * (one / 3).softmax(1) + 0.75 * (two / 3).softmax(1))
    torch.testing.assert_close(weighted.sum(1), torch.ones(N, dtype=torch.float64))
    assert soft_targets([one.bfloat16()]).dtype == torch.float32


def test_layers_of_the_teacher():
    assert uniform_layers(4, 12) == {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}
    with pytest.raises(ValueError, match="do not divide"):
        uniform_layers(5, 12)


def test_hidden_states_by_hand():
    student = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]])
    found = hidden_mse(student, torch.zeros(1, 2, 2), torch.tensor([[True, False]]))
    assert found.sum == 2.5 and found.count == 1


def test_hidden_states_and_projections():
    student, teacher = normal(0, B, S, H).requires_grad_(), normal(1, B, S, 2 * H)
    maps = Projections([0, 1], H, 2 * H).double()
    expected = F.mse_loss(maps(1, student), teacher)
    found = hidden_mse(maps(1, student), teacher)
    torch.testing.assert_close(found.sum / found.count, expected, rtol=1e-12, atol=0)

    pairs = {0: 0, 1: 2}
    both = features([student, 2 * student], [teacher, teacher, -teacher], pairs, maps, mask())
    one, two = hidden_mse(maps(0, student), teacher, mask()), hidden_mse(maps(1, 2 * student), -teacher, mask())
    torch.testing.assert_close(both.sum, one.sum + two.sum)
    assert both.count == 9
    both.sum.backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in maps.parameters())
    padding = student.grad[~mask()] if student.grad is not None else None
    assert padding is not None and padding.count_nonzero() == 0
    plain = features([student], [teacher[..., :H]], {0: 0}, None)
    torch.testing.assert_close(plain.sum / plain.count, F.mse_loss(student, teacher[..., :H]))


def test_attention_maps():
    """The mean over everything without padding; with it each sentence as if it were alone, whatever lies in the padding."""
    student, teacher = normal(0, B, A, S, S).requires_grad_(), normal(1, B, A, S, S)
    whole = attention_mse(student, teacher)
    torch.testing.assert_close(whole.sum / whole.count, F.mse_loss(student, teacher), rtol=1e-12, atol=0)

    hidden = ~(mask()[:, :, None] & mask()[:, None, :])[:, None].expand(B, A, S, S)
    padded = attention_mse(student, teacher.masked_fill(hidden, -torch.inf), mask())
    expected = sum(n * F.mse_loss(student[i, :, :n, :n], teacher[i, :, :n, :n]) for i, n in enumerate((5, 3, 1)))
    torch.testing.assert_close(padded.sum, expected, rtol=1e-12, atol=0)
    assert padded.count == 9
    (gradient,) = torch.autograd.grad(padded.sum, student)
    assert gradient.isfinite().all() and gradient[hidden].count_nonzero() == 0


def rounded(x: Tensor, *shape: int) -> Tensor:
    """Numbers that bfloat16 has, in the type of x."""
    return normal(1, *shape).bfloat16().to(x.dtype)


PARTS: dict[str, Callable[[slice, Tensor], LossSum]] = {
    "outputs": lambda part, x: distillation(x[part], soft_targets([rounded(x, N, C)])[part], targets()[part], 0.4, 2.0),
    "hidden": lambda part, x: hidden_mse(
        x.view(5, 2, C)[part], rounded(x, 5, 2, C)[part], torch.ones(5, 2).bool()[part]
    ),
    "attention": lambda part, x: attention_mse(x.view(-1, 1, 2, 2)[part], rounded(x, 10, 1, 2, 2)[part]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_add_up_and_gradients_are_derivatives(name: str):
    x = normal(0, N, C).requires_grad_()
    whole, one, two = (PARTS[name](part, x) for part in (slice(None), slice(0, 2), slice(2, None)))
    torch.testing.assert_close(one.sum + two.sum, whole.sum, rtol=1e-12, atol=0)
    assert one.count + two.count == whole.count
    assert torch.autograd.gradcheck(lambda y: PARTS[name](slice(None), y).sum, (x,))


@pytest.mark.parametrize("name", PARTS)
def test_half_precision_has_float32s_accuracy(name: str):
    x = normal(0, N, C).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PARTS[name](slice(None), x).sum
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(PARTS[name](slice(None), x.double()).sum.item(), rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: soft_targets([]),
        lambda x: soft_targets([x], 0.0),
        lambda x: soft_targets([x, x], 1.0, [1.0]),
        lambda x: soft_targets([x], 1.0, [-1.0]),
        lambda x: soft_cross_entropy(x, x.softmax(1), -1.0),
        lambda x: distillation(x, x.softmax(1), targets(), weight=1.5),
        lambda x: distillation(x, x.softmax(1), None, weight=0.5),
        lambda x: hidden_mse(x, x[:, :2]),
        lambda x: attention_mse(x[None, None], x[None]),
        lambda x: features([x], [x], {}, None),
    ],
)
def test_refusals(call: Callable):
    with pytest.raises(ValueError):
        call(normal(0, N, C))
