"""Dropout's masks: fair, independent along every axis, and the same however a batch is cut."""

import math

import pytest
import torch
from torch import Tensor

from disttrain.models.dropout import Dropout, Keys, WeightDropout, as_tensor, at_site

SEEDS = torch.arange(5, 13)


def hidden_kept(p: float, sites: int = 4, samples: int = 8, positions: int = 64, features: int = 96) -> Tensor:
    """bool [sites, samples, positions, features]."""
    keys = Keys(SEEDS[:samples], torch.arange(positions))
    return torch.stack([Dropout(p, s)(torch.ones(samples, positions, features), keys) != 0 for s in range(sites)])


def weight_dropout(p: float, samples: int = 4, heads: int = 6, queries: int = 80, keys: int = 80) -> WeightDropout:
    rows = at_site(SEEDS[:samples], 1)
    return WeightDropout(p, rows, torch.arange(heads), torch.arange(queries), torch.arange(keys))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["hidden", "weights"])
def test_masks_are_fair_and_independent(kind: str, p: float) -> None:
    """Rates, pairs of slices along each axis, and rectangles, against what independent draws would give.

    The numbers are fixed, so this cannot fail by chance once it has passed.
    """
    kept = hidden_kept(p) if kind == "hidden" else weight_dropout(p).kept()
    draws = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs(draws.sum()) / math.sqrt(draws.numel()) < 3.5
    for dim in range(draws.ndim):
        slices = draws.movedim(dim, 0).flatten(1)
        count, size = slices.shape
        rates = slices.sum(1) / math.sqrt(size)
        assert abs(rates.square().sum() - count) < 4 * math.sqrt(2 * count), f"rates along axis {dim}"
        pairs = (slices @ slices.T / math.sqrt(size))[torch.ones(count, count).triu(1).bool()]
        assert pairs.abs().max() < 5.5, f"two slices along axis {dim} resemble each other"
        assert abs(pairs.square().sum() - len(pairs)) < 5 * math.sqrt(2 * len(pairs)), f"pairs along axis {dim}"
    # A mask that is an outer product of rows and columns would pass all of the above.
    corners = draws[..., 1:, 1:] * draws[..., :-1, 1:] * draws[..., 1:, :-1] * draws[..., :-1, :-1]
    assert abs(corners.sum()) / math.sqrt(corners.numel()) < 4


def test_scale_and_gradient() -> None:
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.25, 3)(x, Keys(SEEDS[:2], torch.arange(8)))
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    grad = torch.randn_like(x)
    y.backward(grad)
    torch.testing.assert_close(x.grad, torch.where(kept, grad / 0.75, 0.0))


def test_backward_keeps_only_a_bool_mask() -> None:
    kept: list[Tensor] = []
    x = torch.randn(2, 8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Dropout(0.25, 3)(x, Keys(SEEDS[:2], torch.arange(8)))
    assert {t.dtype for t in kept if t.numel() > 1} == {torch.bool}
    assert sum(t.numel() for t in kept if t.numel() > 1) == x.numel()


def test_cut_in_any_way_gives_slices_of_the_whole() -> None:
    x = torch.randn(4, 32, 24)
    keys = Keys(SEEDS[:4], torch.arange(32))
    whole = Dropout(0.5, 2)(x, keys)
    some = torch.tensor([3, 7, 8, 30])
    torch.testing.assert_close(Dropout(0.5, 2)(x[1:3], Keys(SEEDS[1:3], keys.positions)), whole[1:3])
    torch.testing.assert_close(Dropout(0.5, 2)(x[:, some], Keys(SEEDS[:4], some)), whole[:, some])
    torch.testing.assert_close(Dropout(0.5, 2)(x[:, 0], keys), whole[:, 0])
    for i in range(4):
        chunk = Dropout(0.5, 2)
        chunk.part = (i, 4)
        torch.testing.assert_close(chunk(x[:, 8 * i : 8 * i + 8], keys), whole[:, 8 * i : 8 * i + 8])
    weights = weight_dropout(0.5)
    part = weights._replace(rows=weights.rows[1:2], heads=torch.tensor([2, 5]), queries=some, keys=some + 40)
    torch.testing.assert_close(part.kept(), weights.kept()[1:2, [2, 5]][:, :, some][..., some + 40])


def test_weight_factors() -> None:
    dropout = weight_dropout(0.2)
    factors = dropout.factors(torch.float64)
    assert factors.shape == (4, 6, 80, 80)
    torch.testing.assert_close(factors, dropout.kept() * torch.tensor(1.25, dtype=torch.float64))
    weights = torch.rand(4, 6, 80, 80, dtype=torch.float64)
    torch.testing.assert_close(dropout.apply(weights), weights * factors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_mask_in_every_dtype(dtype: torch.dtype) -> None:
    keys = Keys(SEEDS, torch.arange(16))
    y = Dropout(0.3, 1)(torch.ones(8, 16, 32, dtype=dtype), keys)
    assert y.dtype == dtype
    assert torch.equal(y != 0, Dropout(0.3, 1)(torch.ones(8, 16, 32), keys) != 0)


def test_site_as_tensor_is_the_same_site() -> None:
    for site in (0, 1, 37):
        assert torch.equal(at_site(SEEDS, as_tensor(site)), at_site(SEEDS, site))


def test_identity_where_nothing_is_dropped_and_refusals() -> None:
    x = torch.randn(2, 4, 8)
    assert Dropout(0.0, 1)(x, None) is x
    assert Dropout(0.5, 1).eval()(x, None) is x
    for keys in (None, Keys(None, torch.arange(4))):
        with pytest.raises(ValueError, match="dropout_seeds"):
            Dropout(0.5, 1)(x, keys)
    with pytest.raises(ValueError, match="outside 0 to below 1"):
        Dropout(1.0, 1)


def test_masks_never_change() -> None:
    """A resumed run must draw what the interrupted one would have: these numbers are part of the format."""
    keys = Keys(torch.tensor([1, -(2**63)]), torch.tensor([0, 1, 100_000]))
    kept = Dropout(0.5, 1)(torch.ones(2, 3, 16), keys) != 0
    rows = ["".join("01"[bool(k)] for k in row) for row in kept.flatten(0, 1)]
    assert " ".join(rows[:3]) == "1010011011001011 1010001001011111 1000110010100100"
    assert " ".join(rows[3:]) == "0101100000010111 1000101101000010 1011111010100101"
