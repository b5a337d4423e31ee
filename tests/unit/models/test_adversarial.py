"""Perturbed embeddings and reversed gradients against what they are, written out."""

import math

import pytest
import torch
from torch import Tensor, nn

from disttrain.models.adversarial import (
    moved,
    normalised_embeddings,
    perturbation,
    reversal_factor,
    reverse_gradient,
    with_adversaries,
)
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.layers import LossSum
from disttrain.models.losses import cross_entropy

B, S, H, V, C = 4, 3, 6, 11, 3


class Small(nn.Module):
    """Embeds, drops, adds up a sequence non-linearly, classifies."""

    def __init__(self, dropout: float = 0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.head = nn.Linear(H, C)
        self.dropout = Dropout(dropout, 0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, tokens: Tensor, targets: Tensor, seeds: Tensor) -> LossSum:
        x = self.dropout(self.embed(tokens), Keys(seeds, torch.arange(S)))
        return cross_entropy(self.head(x.tanh().sum(1)), targets)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    return tokens, torch.randint(0, C, (B,), generator=generator), torch.arange(B)


def test_perturbation_by_hand():
    """A gradient of 3 and 4 in one example: length 5, so 0.6 and 0.8 of epsilon; none in the other."""
    gradient = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(perturbation(gradient, 2.0), torch.tensor([[[1.2, 0.0], [0.0, 1.6]], [[0.0] * 2] * 2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 1.0, 6e4])
def test_perturbation_has_its_length_whatever_the_gradient(dtype: torch.dtype, size: float):
    gradient = torch.randn(B, S, H, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    r = perturbation((size * gradient).to(dtype), 0.5)
    assert r.dtype == dtype
    torch.testing.assert_close(r.double().flatten(1).norm(dim=1), torch.full((B,), 0.5).double(), rtol=5e-3, atol=0)
    tiny = torch.full((1, S, H), 1e-30)
    torch.testing.assert_close(perturbation(tiny, 0.5).norm(), torch.tensor(0.5))


def test_positions_may_be_apart():
    """Halves of the sequences that know each other's squares move as the whole does."""
    gradient = torch.randn(B, 4, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = gradient.split(2, 1)
    others = [half.flatten(1).square().sum(1) for half in halves[::-1]]
    parts = [perturbation(half, 0.3, lambda x, o=o: x + o) for half, o in zip(halves, others, strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), perturbation(gradient, 0.3), rtol=1e-12, atol=0)


def expected(model: Small, epsilon: float, rows: slice = slice(None)) -> tuple[float, dict[str, Tensor]]:
    """Example by example, with embedded words as leaves: the summed losses and the parameters' gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens, target, seed in zip(*(x[rows].split(1) for x in batch()), strict=True):

        def after(x: Tensor, target: Tensor = target, seed: Tensor = seed) -> Tensor:
            x = model.dropout(x, Keys(seed, torch.arange(S)))
            return nn.functional.cross_entropy(model.head(x.tanh().sum(1)), target)

        leaf = model.embed(tokens).detach().requires_grad_()
        (g,) = torch.autograd.grad(after(leaf), leaf)
        total = total + after(model.embed(tokens)) + after(model.embed(tokens) + epsilon * g / g.norm())
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return total.item(), {n: g for (n, _), g in zip(model.named_parameters(), gradients, strict=True)}


def test_adversaries_are_those_of_single_examples():
    model = Small().double()
    found = with_adversaries(model.embed, lambda: model.loss(*batch()), 0.7)
    total, gradients = expected(model, 0.7)
    assert found.count == B and found.sum.item() == pytest.approx(total, rel=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters()), "only the caller's backward fills them"
    found.sum.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12)


def test_parts_of_a_batch_add_up_and_scaling_changes_nothing():
    model = Small().double()
    whole = with_adversaries(model.embed, lambda: model.loss(*batch()), 0.7).sum
    parts = [with_adversaries(model.embed, lambda r=r: model.loss(*(x[r] for x in batch())), 0.7).sum
             for r in (slice(0, 1), slice(1, 4))]  # fmt: skip
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=0)
    scaled = with_adversaries(model.embed, lambda: LossSum(1024 * model.loss(*batch()).sum, torch.tensor(B)), 0.7)
    torch.testing.assert_close(scaled.sum, 1024 * whole, rtol=1e-12, atol=0)


def test_the_adversary_is_worse_and_frozen_embeddings_work():
    model = Small(dropout=0.0)
    clean = model.loss(*batch()).sum
    both = with_adversaries(model.embed, lambda: model.loss(*batch()), 0.1).sum
    assert both > 2 * clean
    half = with_adversaries(model.embed, lambda: model.loss(*batch()), 0.1, weight=0.5).sum
    torch.testing.assert_close(half, clean + 0.5 * (both - clean))
    model.embed.requires_grad_(False)
    torch.testing.assert_close(with_adversaries(model.embed, lambda: model.loss(*batch()), 0.1).sum, both)
    with torch.no_grad():
        torch.testing.assert_close(with_adversaries(model.embed, lambda: model.loss(*batch()), 0.1).sum, clean)
    assert not model.embed._forward_hooks


def test_an_embedding_called_twice_is_refused():
    model = Small()
    with pytest.raises(ValueError, match="2 times"):
        with_adversaries(model.embed, lambda: [model.loss(*batch()) for _ in range(2)][0], 0.1)
    with pytest.raises(RuntimeError), moved(model.embed, torch.ones(2, 2)):
        model.embed(torch.zeros(1, 3, dtype=torch.int64))
    assert not model.embed._forward_hooks


def test_normalised_embeddings():
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    frequencies = torch.arange(1.0, V + 1)
    v = normalised_embeddings(weight, frequencies)
    f = (frequencies.double() / frequencies.double().sum())[:, None]
    torch.testing.assert_close((f * v).sum(0), torch.zeros(H, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((f * v.square()).sum(0), torch.ones(H, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda w: normalised_embeddings(w, frequencies), (weight,))


def test_reversed_gradient():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    torch.testing.assert_close(gradient, -0.25 * 2 * x.detach())
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    reverse_gradient(half, 0.5).sum().backward()
    assert half.grad is not None and half.grad.tolist() == [-0.5, -0.5] and half.grad.dtype == torch.bfloat16


def test_a_domain_classifier_learns_what_the_features_unlearn():
    """One step of each part, by hand: the classifier descends its loss and the features ascend it."""
    features, domain = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    (reverse_gradient(features, 0.5) @ domain).sum().backward()
    assert domain.grad is not None and features.grad is not None
    assert domain.grad.item() == 2.0 and features.grad.item() == -1.5


def test_schedule_of_the_factor():
    assert reversal_factor(0.0) == 0
    assert reversal_factor(0.1) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert 0.9999 < reversal_factor(1.0) < 1
    assert reversal_factor(0.5, 0.0) == 0
    with pytest.raises(ValueError, match="progress"):
        reversal_factor(1.1)
