"""Self-attention over any encoder's output against torch's own."""

import pytest
import torch
from torch import nn

from disttrain.models.dropout import Keys
from disttrain.models.self_attention import SelfAttention

B, S, H, A = 3, 7, 12, 3


def test_equals_torch():
    """torch.nn.MultiheadAttention with the same weights, padding and all."""
    torch.manual_seed(0)
    block = SelfAttention(H, A).double()
    theirs = nn.MultiheadAttention(H, A, batch_first=True).double()
    size = H // A
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(block.attn.qkv, name).unflatten(0, (A, 3, size))
            getattr(theirs, f"in_proj_{name}").copy_(rows.transpose(0, 1).flatten(0, 2))
        theirs.out_proj.load_state_dict(block.attn.out.state_dict())
    x = torch.randn(B, S, H, dtype=torch.float64)
    mask = torch.arange(S) < torch.tensor([7, 4, 1])[:, None]
    expected = block.norm(x + theirs(x, x, x, key_padding_mask=~mask, need_weights=False)[0])
    torch.testing.assert_close(block(x, mask), expected, rtol=1e-10, atol=1e-12)
    assert {name.rpartition(".")[0] for name, _ in block.named_parameters()} == {"attn.qkv", "attn.out", "norm"}


def test_gradient_is_the_derivative():
    torch.manual_seed(0)
    block = SelfAttention(4, 2).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: block(y, torch.tensor([[True, True, False]])), (x,))


def test_on_a_bilstm_with_dropout_however_the_batch_is_cut():
    torch.manual_seed(0)
    lstm, block = nn.LSTM(5, H // 2, bidirectional=True, batch_first=True), SelfAttention(H, A, 0.4, site=3)
    x, seeds, positions = torch.randn(B, S, 5), torch.arange(B), torch.arange(S)
    y = lstm(x)[0]
    whole = block(y, None, Keys(seeds, positions))
    parts = [block(y[i : i + 1], None, Keys(seeds[i : i + 1], positions)) for i in range(B)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole, block.eval()(y))
    half = block.bfloat16()(y.bfloat16()).float()
    torch.testing.assert_close(half, block.float()(y), rtol=0, atol=5e-2)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads=5"):
        SelfAttention(12, 5)
