"""Dropout of whole words and locked masks: what they drop, how often, and the same however a batch is cut."""

import math

import pytest
import torch
from torch import Tensor, nn

from disttrain.models.dropout import Dropout, Keys, LockedDropout, WordDropout

B, S, H, V = 8, 40, 24, 30
KEYS = Keys(torch.arange(5, 5 + B), torch.arange(S))
TOKENS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))


def ones(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(B, S, H, dtype=dtype)


def test_words_are_dropped_whole_and_everywhere_in_a_sequence() -> None:
    y = WordDropout(0.3, 1)(ones(), TOKENS, KEYS)
    kept = y[..., 0] != 0
    torch.testing.assert_close(y, kept[..., None] * ones() / 0.7)
    fates = [{(int(t), bool(k)) for t, k in zip(TOKENS[b], kept[b], strict=True)} for b in range(B)]
    for b in range(B):
        assert len(fates[b]) == len(TOKENS[b].unique()), "a word is dropped at all its places or at none"
    assert len(set().union(*fates)) > V, "other sequences drop other words"


def test_locked_masks_are_the_same_at_all_positions() -> None:
    dropout = LockedDropout(0.4, 1)
    kept = dropout(ones(), KEYS) != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    torch.testing.assert_close(dropout(ones(), KEYS)[:, 3], dropout.factors(ones()[:, 3], KEYS))
    assert len({tuple(row.tolist()) for row in kept[:, 0]}) == B


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rates_and_pairs_are_fair(p: float) -> None:
    """As of independent draws, along sites, samples and words or features; the numbers are fixed.

    The variance of a mean square of pairs is that of the pairs and, since pairs share slices, that of the squares.
    """
    fourth = (p**3 + (1 - p) ** 3) / (p * (1 - p))
    seeds = Keys(torch.arange(64), torch.arange(100))
    tokens = torch.arange(100).expand(64, 100)
    x = torch.ones(64, 100, 1)
    words = torch.stack([WordDropout(p, s)(x, tokens, seeds)[..., 0] for s in range(4)]) != 0
    locked = torch.stack([LockedDropout(p, s).factors(x[..., 0], seeds) for s in range(4)]) != 0
    for kept in (words, locked):
        draws = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))
        assert abs(draws.sum()) / math.sqrt(draws.numel()) < 3.5
        for dim in range(3):
            slices = draws.movedim(dim, 0).flatten(1)
            count, size = slices.shape
            pairs = (slices @ slices.T / math.sqrt(size))[torch.ones(count, count).triu(1).bool()]
            assert pairs.abs().max() < 5.5, f"two slices along axis {dim} resemble each other"
            variance = (2 + (fourth**2 - 3) / size) / len(pairs) + 4 * (fourth - 1) / draws.numel()
            assert abs(pairs.square().mean() - 1) < 4 * math.sqrt(variance), f"pairs along axis {dim}"


def test_cut_in_any_way_gives_slices_of_the_whole() -> None:
    some, rows = torch.tensor([3, 7, 30]), slice(2, 5)
    part = Keys(KEYS.seeds[rows] if KEYS.seeds is not None else None, some)
    words, locked = WordDropout(0.5, 2), LockedDropout(0.5, 2)
    x = torch.randn(B, S, H)
    whole = words(x, TOKENS, KEYS)
    torch.testing.assert_close(words(x[rows][:, some], TOKENS[rows][:, some], part), whole[rows][:, some])
    torch.testing.assert_close(locked(x[rows][:, some], part), locked(x, KEYS)[rows][:, some])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_same_mask_in_every_dtype_and_its_gradient(dtype: torch.dtype) -> None:
    x = ones(dtype).requires_grad_()
    for y, single in (
        (WordDropout(0.5, 1)(x, TOKENS, KEYS), WordDropout(0.5, 1)(ones(), TOKENS, KEYS)),
        (LockedDropout(0.5, 1)(x, KEYS), LockedDropout(0.5, 1)(ones(), KEYS)),
    ):
        assert y.dtype == dtype and torch.equal(y.float(), single)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient.float(), single)


def test_a_recurrence_with_one_mask_for_all_steps() -> None:
    """Gal and Ghahramani's LSTM: the state is dropped alike before every step; in eval mode it is torch's LSTM."""
    torch.manual_seed(0)
    cell, dropout = nn.LSTMCell(H, H), LockedDropout(0.5, 4)
    x = torch.randn(B, 5, H)

    def run(keys: Keys, rows: slice) -> Tensor:
        h = c = torch.zeros(len(x[rows]), H)
        factors = dropout.factors(h, keys)
        for t in range(5):
            h, c = cell(x[rows, t], (h * factors, c))
        return h

    whole = run(KEYS, slice(None))
    seeds = torch.arange(5, 5 + B)
    torch.testing.assert_close(run(Keys(seeds[3:], torch.arange(5)), slice(3, None)), whole[3:])
    dropout.eval()
    lstm = nn.LSTM(H, H, batch_first=True)
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    torch.testing.assert_close(run(KEYS, slice(None)), lstm(x)[1][0][0], rtol=1e-5, atol=1e-6)


def test_identity_where_nothing_is_dropped_and_refusals() -> None:
    x = torch.randn(B, S, H)
    assert WordDropout(0.0, 1)(x, TOKENS, None) is x and WordDropout(0.5, 1).eval()(x, TOKENS, None) is x
    assert LockedDropout(0.0, 1)(x, None) is x and LockedDropout(0.5, 1).eval()(x, None) is x
    assert torch.equal(LockedDropout(0.0, 1).factors(x[:, 0], None), torch.ones(B, H))
    for call in (lambda: WordDropout(0.5, 1)(x, TOKENS, None), lambda: LockedDropout(0.5, 1)(x, None)):
        with pytest.raises(ValueError, match="dropout_seeds"):
            call()
    for kind in (Dropout, WordDropout, LockedDropout):
        with pytest.raises(ValueError, match="outside 0 to below 1"):
            kind(1.0, 1)


def test_masks_never_change() -> None:
    """A resumed run must draw what the interrupted one would have: these numbers are part of the format."""
    keys = Keys(torch.tensor([1, -(2**63)]), torch.arange(16))
    words = WordDropout(0.5, 1)(torch.ones(2, 16, 1), torch.arange(16).expand(2, 16), keys)
    locked = LockedDropout(0.5, 1).factors(torch.ones(2, 16), keys)
    assert ["".join("01"[bool(k)] for k in row) for row in words.flatten(1)] == ["1110000010000000", "0110000100101000"]
    assert ["".join("01"[bool(k)] for k in row) for row in locked] == ["1111011001001011", "0111011000000100"]
